"""First weights of a tokenizer through which a signal passes from the first step on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..models import SAT

__all__ = ["LOUDNESS", "initialize_tokenizer", "preserve_variance"]

LOUDNESS = 0.2
"""Of recordings, where latents are about one."""


@torch.no_grad()
def preserve_variance(model: nn.Module, gain: float = 1.0) -> None:
    """Draws convolution weights anew, so that each layer multiplies scale by `gain` alone; zeroes biases.

    PyTorch's default shrinks a signal by sqrt(3) at each layer. Behind the encoder of a SAT the biases drown
    what is left of it a hundredfold, and minutes of training pass before anything comes through.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            # Of a transposed convolution only every stride-th tap meets an input sample.
            overlap = layer.stride[0] if isinstance(layer, nn.ConvTranspose1d) else 1
            fan_in = layer.in_channels * layer.kernel_size[0] / overlap
            drawn = gain * torch.randn_like(layer.weight) / fan_in**0.5
            if parametrize.is_parametrized(layer, "weight"):
                layer.weight = drawn  # the two factors of weight norm
            else:
                layer.weight.copy_(drawn)
            layer.bias.zero_()


def initialize_tokenizer(sat: SAT, loudness: float = LOUDNESS) -> None:
    """`preserve_variance`, and first sounds of `loudness`."""
    preserve_variance(sat)
    preserve_variance(sat.decoder.model[-1], gain=loudness)
