"""The accuracy test of the native backend on a few cases, for a process that was started in a way of its own.

``python seanet_equality.py LEVEL CASES``: LEVEL is the instruction set that must be the active one.
"""

import sys

import torch
from gradient_cases import check_gradients
from normed_cases import check_norm, check_normed_layers
from seanet_cases import (
    check_bf16,
    check_lstm,
    check_lstm_bf16,
    check_stack,
    inputs_of,
    make_input,
    make_layers,
    make_wide_layers,
)
from snake_cases import long_enough, make_dac_layers
from stream_cases import check_streams

from aar_kernels import dispatch

torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty is filled with NaN
reason = dispatch.operators()["seanet_stack"]["native"]
assert reason is None, reason
report = torch.ops.aar_native.isa_report()
assert report.endswith(f"active={sys.argv[1]}"), report
for seed in range(int(sys.argv[2])):
    layers = make_layers(seed)
    check_stack(layers, make_input(seed, inputs_of(layers)), "native")
    check_bf16(layers, make_input(seed, inputs_of(layers)), "native")
for seed in range(24):
    layers = make_dac_layers(seed)
    check_stack(layers, long_enough(layers, make_input(seed, inputs_of(layers))), "native", blocks=(1, 40))
for seed in range(3):
    check_stack(make_wide_layers(seed), make_input(seed, 64, 51), "native")
    check_bf16(make_wide_layers(seed), make_input(seed, 64, 51), "native")
for seed in range(6):
    check_streams(seed, "native")
for seed in range(12):
    check_gradients(seed, "native")
check_gradients(2, "native", 900)
for channels in (1, 5, 16, 33):
    for batch in (1, 2, 7, 13):
        check_lstm(batch, channels, 2, torch.randn(batch, channels, 70), "native")
        check_lstm_bf16(batch, channels, torch.randn(batch, channels, 70), "native")
    check_norm(channels, 300, 2, 5.0, True, "native")
for seed in range(8):
    check_normed_layers(seed, 40, "native")
print("equal")
