"""The published AAR: weights under `model_state_dict`, each name behind `module.` where training was distributed."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models import AAR, SAT, AARConfig
from .files import Source, read_tensors, shape_of

_NAMES = {  # the published name of each of our tensors outside the blocks
    "condition_in.weight": "class_emb.fc1.weight",
    "condition_out.weight": "class_emb.fc2.weight",
    "null_condition": "uncond_embedding",
    "start": "pos_start",
    "position": "pos_1LC",
    "level": "lvl_embed.weight",
    "word.weight": "word_embed.weight",
    "word.bias": "word_embed.bias",
    "head_modulation.weight": "head_nm.ada_lin.1.weight",
    "head_modulation.bias": "head_nm.ada_lin.1.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
_BLOCK_NAMES = {
    "qkv.weight": "attn.mat_qkv.weight",
    "q_bias": "attn.q_bias",
    "v_bias": "attn.v_bias",
    "log_scale": "attn.scale_mul_1H11",
    "proj": "attn.proj",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
    "modulation": "ada_lin.1",
}
# Derived from the schedule, or always zero.
_DERIVED = re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")


def aar_from_published(source: Source, tokenizer: SAT) -> AAR:
    """Builds the AAR of a published checkpoint; every size is read off its tensors and the tokenizer.

    Args:
        source: a .pth file, read with `weights_only`, or what it holds.
        tokenizer: the SAT whose codes it was trained on; its codebooks are copied into the model.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        CheckpointError: not a checkpoint, one with anything missing, unexpected or misshaped (all are listed), or
            one of another schedule, latent size or number of codes than the tokenizer's.
        OSError: the file does not exist or may not be read.
    """
    state, name = read_tensors(source, "model_state_dict", "an AAR checkpoint")
    config = AARConfig(**_sizes(state, name), **_tokenizer_sizes(tokenizer))
    _check_schedule(state, config, name)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in AAR(config).state_dict().items()}
    ours = {key: published_name(key) for key in shapes if not key.startswith("quantizer.")}
    state = {key: value for key, value in state.items() if not _DERIVED.fullmatch(key)}
    expected = {theirs: _published_shape(own, shapes[own], config) for own, theirs in ours.items()}
    CheckpointError.check(name, expected, state)
    model = AAR(config).set_quantizer(tokenizer.quantizer)
    model.load_state_dict({own: state[theirs].reshape(shapes[own]) for own, theirs in ours.items()}, strict=False)
    return model.eval()


def _sizes(state: Mapping[str, Tensor], name: str) -> dict:
    def shape(key: str, rank: int) -> tuple[int, ...]:
        return shape_of(state, key, rank, f"{name} is not an AAR checkpoint")

    width, condition_dim = shape("class_emb.fc1.weight", 2)
    blocks = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    hidden, _ = shape("blocks.0.ffn.fc1.weight", 2)
    cosine = "blocks.0.attn.scale_mul_1H11" in state
    return {
        "depth": max(blocks) + 1,
        "width": width,
        # Without a scale per head no tensor tells how many there are; the paper's have 64 channels.
        "heads": shape("blocks.0.attn.scale_mul_1H11", 4)[1] if cosine else max(width // 64, 1),
        "mlp_ratio": max(hidden // width, 1),
        "condition_dim": condition_dim,
        "cosine_attention": cosine,
    }


def _tokenizer_sizes(tokenizer: SAT) -> dict:
    names = "lengths", "codebook_size", "latent_dim", "phi_kernel_sizes", "phi_sharing", "shared_codebook", "metric"
    return {name: getattr(tokenizer.config, name) for name in names}


def _check_schedule(state: Mapping[str, Tensor], config: AARConfig, name: str) -> None:
    if "lvl_1L" in state:
        trained = tuple(torch.unique_consecutive(state["lvl_1L"].flatten(), return_counts=True)[1].tolist())
        if trained != config.lengths:
            raise CheckpointError(f"{name} is for scales of {trained} tokens, the tokenizer has {config.lengths}")


def published_name(own: str) -> str:
    """The published name of one of `AAR`'s tensors."""
    block = re.match(r"blocks\.\d+\.", own)
    if not block:
        return _NAMES[own]
    rest = own[block.end() :]
    layer, _, parameter = rest.rpartition(".")
    return block[0] + (_BLOCK_NAMES.get(rest) or f"{_BLOCK_NAMES[layer]}.{parameter}")


def _published_shape(own: str, shape: tuple[int, ...], config: AARConfig) -> tuple[int, ...]:
    """Some parameters carry the axes along which they are broadcast."""
    if own.endswith("log_scale"):
        return 1, config.heads, 1, 1
    return (1, *shape) if own in ("start", "position", "null_condition") else shape
