"""The model behind ``benchmarks.kernels.prediction``."""
