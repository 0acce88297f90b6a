"""Where a prefill's time goes: profiled engines, attribution of their traces, tables and plots."""
