"""The accuracy tests of the native backend on a few cases, for a process that was started in a way of its own.

``python modulation_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import torch
from modulation_cases import CHANNELS, DTYPES, assert_accurate, make_case, random_case

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["modulation_forward"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(100, 100 + int(sys.argv[2])):
    assert_accurate(random_case(seed), "native")
for dtype in DTYPES:
    for channels in CHANNELS:
        assert_accurate(make_case(0, length=33, channels=channels, dtype=dtype), "native")
print("equal")
