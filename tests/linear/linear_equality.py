"""The accuracy test of the native backend on a few cases, for a process that was started in a way of its own.

``python linear_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import torch
from linear_cases import DTYPES, ROWS, check, make_case

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["linear_forward"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    check(make_case(seed), "native")
for rows in ROWS:
    for dtype in DTYPES:
        check(make_case(rows, dtype, M=rows, K=257, N=100), "native")
print("equal")
