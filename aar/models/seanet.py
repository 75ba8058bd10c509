"""SEANet encoder and decoder, as SAT uses them: non-causal, reflect padding, an LSTM at the latent rate.

Source: arXiv 2408.09027, section 3.1 (SAT keeps EnCodec's autoencoder, arXiv 2210.13438, section 3.1).
Parameters carry the names of the published checkpoints, which is why a convolution sits at `conv.conv` and
layers are numbered in one `model` sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from aar_kernels import BackendError, dispatch, seanet

__all__ = ["SEANet", "seanet_decoder", "seanet_encoder"]


def _nested(name: str, layer: nn.Module) -> nn.Sequential:
    """The published names nest each convolution twice."""
    return nn.Sequential(OrderedDict([(name, layer)]))


class Conv(nn.Module):
    """Convolution with reflect padding: [B, in, N] -> [B, out, N / stride], N a multiple of the stride."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, weight_norm: bool
    ):
        super().__init__()
        layer = nn.Conv1d(in_channels, out_channels, kernel_size, stride)
        self.conv = _nested("conv", parametrizations.weight_norm(layer) if weight_norm else layer)
        right = (kernel_size - stride) // 2
        self.padding = (kernel_size - stride - right, right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Padding by nothing would copy.
        return self.conv(F.pad(x, self.padding, mode="reflect") if any(self.padding) else x)


class ConvTranspose(nn.Module):
    """Transposed convolution, trimmed to an exact multiple: [B, in, T] -> [B, out, T * stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, *, weight_norm: bool
    ):
        super().__init__()
        layer = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride)
        self.convtr = _nested("convtr", parametrizations.weight_norm(layer) if weight_norm else layer)
        right = (kernel_size - stride) // 2
        self.trim = (kernel_size - stride - right, right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.trim
        y = self.convtr(x)
        return y[..., left : y.shape[-1] - right]


class Residual(nn.Module):
    """x -> shortcut(x) + narrow(x), where `narrow` works at half the channels: [B, C, N] -> [B, C, N]."""

    def __init__(self, channels: int, *, weight_norm: bool):
        super().__init__()
        hidden = channels // 2
        self.block = nn.Sequential(
            nn.ELU(),
            Conv(channels, hidden, 3, weight_norm=weight_norm),
            nn.ELU(),
            Conv(hidden, channels, 1, weight_norm=weight_norm),
        )
        self.shortcut = Conv(channels, channels, 1, weight_norm=weight_norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.block(x)


class SkipLSTM(nn.Module):
    """LSTM over time with a skip connection: [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(2, 0, 1)
        return (self.lstm(x)[0] + x).permute(1, 2, 0)


class SEANet(nn.Module):
    """Layers in turn: [B, in, N] -> [B, out, N'].

    Where gradients are asked for, in fp32 on a CPU, convolutions run as `aar_kernels.seanet.convolve`, if the native
    kernels were built; otherwise the layers run as the modules that they are. `inference.run` is for inference.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trains = torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        if not trains or self.backend("seanet_layer", x) != "native":
            return self.model(x)
        for is_lstm, layers in groupby(self._described(), lambda layer: isinstance(layer, SkipLSTM)):
            if is_lstm:
                for layer in layers:
                    x = layer(x)
            else:
                x = seanet.convolve(x, list(layers))
        return x

    def layers(self) -> list[seanet.Conv | seanet.ConvTranspose | seanet.Residual | seanet.LSTM]:
        """The layers with the weights that they have now."""
        described = self._described()
        return [seanet.LSTM(layer.lstm.all_weights) if isinstance(layer, SkipLSTM) else layer for layer in described]

    def _described(self) -> Iterator[seanet.Conv | seanet.ConvTranspose | seanet.Residual | SkipLSTM]:
        elu = False
        for module in self.model:
            if isinstance(module, nn.ELU):
                elu = True
            else:
                yield module if isinstance(module, SkipLSTM) else _describe(module, elu)
                elu = False

    def backend(self, operator: str, x: torch.Tensor) -> str | None:
        """What runs this operator of `aar_kernels.seanet` on x and the weights; None where the modules must run."""
        if any(weight.device != x.device or weight.dtype != x.dtype for weight in self.parameters()):
            return None  # the modules say what is wrong
        try:
            return dispatch.select(operator, x)
        except BackendError:  # a backend was forced that has no such kernel: it is for the quantizer alone
            return None


def _describe(module: nn.Module, elu: bool) -> seanet.Conv | seanet.ConvTranspose | seanet.Residual:
    if isinstance(module, Residual):
        first, narrow = _describe(module.block[1], True), _describe(module.block[3], True)
        return seanet.Residual(first, narrow, _describe(module.shortcut, False))
    transposed = isinstance(module, ConvTranspose)
    conv, kind = (module.convtr.convtr, seanet.ConvTranspose) if transposed else (module.conv.conv, seanet.Conv)
    return kind(conv.weight, conv.bias, conv.stride[0], elu=elu)


def seanet_encoder(
    dim: int, n_filters: int, ratios: Sequence[int], lstm_layers: int, *, weight_norm: bool
) -> SEANet:
    """Builds wave [B, 1, N] -> latents [B, dim, N / prod(ratios)]; N a multiple of prod(ratios).

    `ratios` are in the decoder's order, so the encoder walks them backwards. Channels double at each.
    """
    channels = n_filters
    layers = [Conv(1, channels, 7, weight_norm=weight_norm)]
    for ratio in reversed(ratios):
        layers += [
            Residual(channels, weight_norm=weight_norm),
            nn.ELU(),
            Conv(channels, 2 * channels, 2 * ratio, ratio, weight_norm=weight_norm),
        ]
        channels *= 2
    layers += [SkipLSTM(channels, lstm_layers), nn.ELU(), Conv(channels, dim, 7, weight_norm=weight_norm)]
    return SEANet(layers)


def seanet_decoder(
    dim: int, n_filters: int, ratios: Sequence[int], lstm_layers: int, *, weight_norm: bool
) -> SEANet:
    """Builds latents [B, dim, T] -> wave [B, 1, T * prod(ratios)]. Channels halve at each ratio."""
    channels = n_filters * 2 ** len(ratios)
    layers = [Conv(dim, channels, 7, weight_norm=weight_norm), SkipLSTM(channels, lstm_layers)]
    for ratio in ratios:
        layers += [
            nn.ELU(),
            ConvTranspose(channels, channels // 2, 2 * ratio, ratio, weight_norm=weight_norm),
            Residual(channels // 2, weight_norm=weight_norm),
        ]
        channels //= 2
    layers += [nn.ELU(), Conv(channels, 1, 7, weight_norm=weight_norm)]
    return SEANet(layers)
