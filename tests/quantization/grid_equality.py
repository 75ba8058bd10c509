"""The accuracy tests of grids on the native backend, for a process that was started in a way of its own.

``python grid_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import test_grids
import test_rows
import torch

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["msrq_encode"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    test_grids.test_encode("native", seed)
    test_grids.test_step("native", seed)
    test_rows.test_step_of_rows("native", seed)
    for name in test_grids.DECODERS:
        test_grids.test_decode("native", seed, name)
        test_rows.test_decoding_of_rows("native", seed, name)
print("equal")
