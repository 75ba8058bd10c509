"""The least that a run must do: floating-point operations, and bytes read from memory.

Counted are the transformer's linear layers and attention, keys and values read, and modulations once per item. Not
counted: activations, which fit the caches, layer norms, sampling, and the quantizer (0.2 % of a depth of 16). Of the
tokenizer: convolutions, LSTMs and the search; not spectrograms, nor a discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aar import AAR, SAT


@dataclass(frozen=True)
class Pass:
    """One pass over the weights."""

    flops: int
    weight_bytes: int
    cache_bytes: int = 0

    def floor(self, gflops: float, gbs: float) -> float:
        """Milliseconds at least, for arithmetic or for reading, whichever takes longer."""
        return max(self.flops / gflops, (self.weight_bytes + self.cache_bytes) / gbs) / 1e6


def scale_passes(model: AAR, batch: int, dtype: torch.dtype) -> list[Pass]:
    """Guided sampling of AAR: the modulations, then each scale. The first scale runs without its unconditional half."""
    schedule = model.schedule
    items = [batch] + [2 * batch] * (schedule.num_scales - 1)
    steps = zip(items, schedule.lengths, schedule.offsets[1:], strict=True)
    return [_modulations(model, batch), *(_tokens(model, *step, dtype) for step in steps)]


def next_token_passes(model: AAR, batch: int, length: int, dtype: torch.dtype) -> list[Pass]:
    """Guided sampling of a next-token model: the modulations, then each token."""
    steps = [_tokens(model, 2 * batch, 1, end, dtype) for end in range(1, length + 1)]
    return [_modulations(model, 2 * batch), *steps]


def training_flops(model: AAR, batch: int) -> int:
    """Forward and backward: three times the forward pass. Of attention, the pairs that the mask lets through."""
    schedule, config = model.schedule, model.config
    linear = 2 * batch * (schedule.total * _linear_weights(model) + _modulation_weights(model))
    return 3 * (linear + 4 * batch * schedule.attention_pairs * config.width * config.depth)


def tokenizer_training_flops(model: SAT, batch: int) -> int:
    """Those of the autoencoder, and the search for codes, once."""
    config = model.config
    search = 2 * config.schedule.total * config.codebook_size * config.latent_dim
    return autoencoder_training_flops(model, batch) + batch * search


def autoencoder_training_flops(model: SAT, batch: int) -> int:
    """Forward and backward of convolutions and LSTMs: three times the forward pass."""
    forward = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal forward
        if isinstance(layer, nn.LSTM):
            weights = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
            forward += 2 * inputs[0].shape[0] * weights
        else:
            places = inputs[0] if isinstance(layer, nn.ConvTranspose1d) else output
            forward += 2 * places.shape[-1] * layer.weight.numel()

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d, nn.LSTM))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        window = torch.zeros(1, 1, model.config.window_samples)
        model.decoder(model.encoder(window))
    for hook in hooks:
        hook.remove()
    return batch * 3 * forward


def _tokens(model: AAR, items: int, n: int, end: int, dtype: torch.dtype) -> Pass:
    """``n`` more tokens of each item, up to token ``end``."""
    config, weights = model.config, _linear_weights(model)
    channels = config.width * config.depth
    flops = 2 * items * n * weights + 4 * items * n * end * channels
    return Pass(flops, weights * dtype.itemsize, 2 * items * end * channels * model.position.itemsize)


def _modulations(model: AAR, items: int) -> Pass:
    weights = _modulation_weights(model)
    return Pass(2 * items * weights, weights * model.position.itemsize)


def _linear_weights(model: AAR) -> int:
    layers = [model.word, model.head]
    for block in model.blocks:
        layers += [block.qkv, block.proj, block.fc1, block.fc2]
    return sum(layer.weight.numel() for layer in layers)


def _modulation_weights(model: AAR) -> int:
    return sum(part.modulation.weight.numel() for part in model.blocks) + model.head_modulation.weight.numel()
