"""Whole-model benchmarks: ``python -m benchmarks.generation`` and ``python -m benchmarks.training``.

Those of single operators are ``python -m aar_kernels.bench``. Measured numbers are in `results/`, what they mean in
`NOTES.md`.
"""
