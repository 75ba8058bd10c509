"""Tests of factorised quantizers on a few cases, for a process that was started in a way of its own.

``python projected_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import test_projected
import torch

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["msrq_encode_projected"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    test_projected.test_encode_projected("native", seed)
    test_projected.test_decode_projected("native", seed)
test_projected.test_random_shapes_of_the_projection()
print("equal")
