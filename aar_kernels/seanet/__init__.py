"""The convolution stacks and the LSTM of SEANet autoencoders (EnCodec, SAT and others): `stack` and `lstm` for
inference, and `convolve`, which is differentiable, for training.

The trail of the operator: `layers` (layers as data, and how weights are stored), `reference` (the mathematics), `api`
(public functions), `ops` (schemas, autograd), `native` and `triton` (backends), `module` (a whole encoder or decoder),
`normed` (layers of it with norms over time), `streaming` (the same in chunks), `encodec` and `dac` (layers of models
that others wrote). Its native code is csrc/cpu/seanet_kernels.h, and seanet_backward.h for training.
"""

from .api import convolve, lstm, norm_, stack
from .layers import LSTM, Conv, ConvTranspose, Norm, PackedLSTM, PackedStack, Residual, Tanh, pack, pack_lstm
from .module import PackedSEANet
from .streaming import Stream

__all__ = [
    "LSTM",
    "Conv",
    "ConvTranspose",
    "Norm",
    "PackedLSTM",
    "PackedSEANet",
    "PackedStack",
    "Residual",
    "Stream",
    "Tanh",
    "convolve",
    "lstm",
    "norm_",
    "pack",
    "pack_lstm",
    "stack",
]
