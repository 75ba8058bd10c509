"""Microbenchmarks of the operators: ``python -m aar_kernels.bench``.

An operator's module here yields its cases (`measure.Case`); `run` checks and times them, `rows` holds what came out,
`tables`, `page` and `plots` show it, and `compare` sets it beside an earlier run. `shapes` is what `--shapes` means.
"""
