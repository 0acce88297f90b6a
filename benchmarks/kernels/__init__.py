"""One layer's prefill, kernel against kernel: the parts of ``benchmarks.benchmark_kernels``."""
