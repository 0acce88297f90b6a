"""Kernels: fast versions of the patterns, one module a device, and the plain PyTorch reference."""
