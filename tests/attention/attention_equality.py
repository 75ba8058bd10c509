"""The accuracy tests of the native backend on a few cases, for a process that was started in a way of its own.

``python attention_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import test_attention_accuracy
import test_attention_step
import torch
from attention_cases import attention_case

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["attention_forward"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    test_attention_accuracy.assert_accurate("native", attention_case(seed))
    test_attention_step.assert_steps_accurate("native", attention_case(seed))
test_attention_accuracy.test_any_number_of_channels("native", 33)
print("equal")
