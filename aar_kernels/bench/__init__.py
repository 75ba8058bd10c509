"""Microbenchmarks of the operators: ``python -m aar_kernels.bench quantization``."""
