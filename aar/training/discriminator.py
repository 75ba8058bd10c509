"""EnCodec's multi-scale STFT discriminator (arXiv 2210.13438, section 3.4): is this wave a recording?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["WINDOWS", "Judgement", "MultiScaleSTFTDiscriminator", "STFTDiscriminator"]

WINDOWS = (2048, 1024, 512, 256, 128)


class Judgement(NamedTuple):
    """Logits [B, 1, frames, bins'], high where a recording is heard, and the feature maps [B, filters, frames, bins'']
    of the layers before."""

    logits: Tensor
    features: list[Tensor]


class STFTDiscriminator(nn.Module):
    """Two-dimensional convolutions over the complex spectrogram of one resolution.

    Time runs along the first axis of the kernels; three layers dilate it by 1, 2 and 4 and halve the bins. Kernels are
    9 bins wide, where the paper writes 8: only an odd width can be centred, and its published code uses 9 as well.
    """

    def __init__(self, window: int, filters: int = 32):
        super().__init__()
        self.n_fft, self.hop = window, window // 4
        hann = torch.hann_window(window)
        # White noise then comes in at the same loudness whatever the window.
        self.register_buffer("window", hann / hann.norm(), persistent=False)
        self.layers = nn.ModuleList([_conv(2, filters, (3, 9))])
        self.layers += [_conv(filters, filters, (3, 9), stride=(1, 2), dilation=(2**i, 1)) for i in range(3)]
        self.layers.append(_conv(filters, filters, (3, 3)))
        self.head = _conv(filters, 1, (3, 3))

    def forward(self, wave: Tensor) -> Judgement:
        """Waves [B, 1, N], N above window / 2."""
        # torch.stft knows no bfloat16.
        with torch.autocast(wave.device.type, enabled=False):
            rows = wave.squeeze(1).to(self.window.dtype)
            spectrum = torch.stft(rows, self.n_fft, self.hop, window=self.window, return_complex=True)
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return Judgement(self.head(x), features)


class MultiScaleSTFTDiscriminator(nn.Module):
    """One `STFTDiscriminator` per window, with its own weights: waves [B, 1, N] -> a `Judgement` of each.

    Raises:
        ValueError: waves of another shape, or not longer than half of the longest window.
    """

    def __init__(self, windows: Sequence[int] = WINDOWS, filters: int = 32):
        super().__init__()
        self.discriminators = nn.ModuleList(STFTDiscriminator(window, filters) for window in windows)

    def forward(self, wave: Tensor) -> list[Judgement]:
        shortest = max(part.n_fft for part in self.discriminators) // 2 + 1
        if wave.dim() != 3 or wave.shape[1] != 1 or wave.shape[2] < shortest:
            raise ValueError(f"wave must be [B, 1, N] with N at least {shortest}, got {list(wave.shape)}")
        return [part(wave) for part in self.discriminators]


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], **options) -> nn.Module:
    dilation = options.get("dilation", (1, 1))
    padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    return weight_norm(nn.Conv2d(inputs, outputs, kernel, padding=padding, **options))
