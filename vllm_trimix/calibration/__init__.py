"""The break-even prompt lengths: what to measure, what the timings prove, the overlay that records it."""
