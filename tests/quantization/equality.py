"""The accuracy tests of the native backend on a few cases, for a process that was started in a way of its
own.

``python equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import test_accuracy
import torch

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["msrq_encode"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(12, 12 + int(sys.argv[2])):
    test_accuracy.test_encode("native", seed)
    test_accuracy.test_step("native", seed)
    for straight_through in ("per_scale", "once"):
        test_accuracy.test_quantize("native", seed, straight_through)
    for name in ("decode", "decode_scales", "next_scale_inputs"):
        test_accuracy.test_decode("native", seed, name)
for shape in ((4, 33, 16), (1, 100, 7)):
    for replace in (False, True):
        test_accuracy.test_update("native", shape, replace)
print("equal")
