"""The native backend against the reference on a few calls, for a process that was started in a way of its own.

``python sampling_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import test_sampling_equality as equality
import torch

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled
reason = dispatch.operators()["sampling_sample"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(1000, 1000 + int(sys.argv[2])):
    equality.test_random_calls("native", seed)
equality.test_hard_rows("native")
equality.test_weights_to_the_last_bit("native")
print("equal")
