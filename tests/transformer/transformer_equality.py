"""The accuracy test of the native backend on a few cases, for a process that was started in a way of its own.

``python transformer_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import torch
from transformer_cases import check, make_case

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["transformer_step"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    check(make_case(seed), "native")
print("equal")
