"""Reads the published SAT checkpoints (arXiv 2408.09027) into this library's modules.

Their layout: weights under `generator_state_dict`, each name behind `module.` where training was distributed;
weight norm as `weight_g` and `weight_v`; the quantizer under `quantizer.vq`, with one codebook per scale at
`layers.{s}._codebook` and phi at `quant_resi`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import aar_kernels as ak

from ..errors import CheckpointError
from ..models import SAT, SATConfig
from ..models.seanet import seanet_decoder, seanet_encoder
from .files import Source, read_tensors, shape_of

Lengths = Iterable[int] | ak.ScaleSchedule

_QUANTIZER = "quantizer.vq."
# Where phi's convolutions sit tells how scales share them. One that all share has no number.
_PHI = {
    "partial": re.compile(re.escape(_QUANTIZER) + r"quant_resi\.qresi_ls\.(\d+)\."),
    "full": re.compile(re.escape(_QUANTIZER) + r"quant_resi\.qresi\.()"),
    "none": re.compile(re.escape(_QUANTIZER) + r"quant_resi\.(\d+)\."),
}
_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def sat_from_published(source: Source, lengths: Lengths) -> SAT:
    """Builds the SAT of a published checkpoint; every size but the schedule is read off its tensors.

    Args:
        source: a .pth file, read with `weights_only`, or what it holds.
        lengths: the schedule, one length per scale, which no tensor tells. Published is
            ScaleSchedule.quadratic(16, 75).

    Returns:
        The model on the CPU, in evaluation mode, weight norm as it is stored.

    Raises:
        CheckpointError: not a checkpoint, or one with anything missing, unexpected or misshaped (all are
            listed), or another number of scales.
        OSError: the file does not exist or may not be read.
    """
    state, name = _normalized(source)
    schedule = _schedule(lengths)
    sizes = _quantizer_sizes(state, schedule, name)
    sizes |= _seanet_sizes(state, name)
    seanet = {_published_name(own): (own, shape) for own, shape in _seanet_shapes(sizes).items()}
    expected = {key: shape for key, (_, shape) in seanet.items()} | _quantizer_shapes(state, schedule, sizes)
    CheckpointError.check(name, expected, state)
    model = SAT(SATConfig(lengths=schedule.lengths, **sizes))
    ours = {own: state[key] for key, (own, _) in seanet.items()}
    ours |= {f"quantizer.{key}": value for key, value in _quantizer_state(state, schedule).items()}
    model.load_state_dict(ours)
    return model.eval()


def quantizer_from_published(
    state_dict: Mapping[str, Tensor], lengths: Lengths
) -> ak.nn.MultiScaleResidualQuantizer:
    """Builds the quantizer of a published checkpoint; every size but the schedule is read off its tensors.

    Args:
        state_dict: a whole checkpoint, or its quantizer alone, with or without the `quantizer.vq.` prefix.
            `embed_avg` may be left out: it follows from `embed` and `cluster_size`.
        lengths: the schedule, one length per scale.

    Returns:
        The quantizer on the CPU, in evaluation mode. Phi is shared as the names tell.

    Raises:
        CheckpointError: anything missing, unexpected or misshaped (all are listed), or another number
            of scales.
    """
    state, name = _normalized(state_dict)
    state = {key: value for key, value in state.items() if key.startswith("quantizer.")}
    schedule = _schedule(lengths)
    sizes = _quantizer_sizes(state, schedule, name)
    CheckpointError.check(name, _quantizer_shapes(state, schedule, sizes), state)
    quantizer = ak.nn.MultiScaleResidualQuantizer(**sizes, schedule=schedule)
    quantizer.load_state_dict(_quantizer_state(state, schedule))
    return quantizer.eval()


def _normalized(source: Source) -> tuple[dict[str, Tensor], str]:
    """The tensors under the names of a whole, undistributed model; and what to call the source."""
    state, name = read_tensors(source, "generator_state_dict", "a SAT checkpoint")
    # A quantizer alone is named as if it were the whole model, so that errors speak of the published names.
    for part in ("layers.", "vq."):
        if any(key.startswith(part) for key in state):
            prefix = _QUANTIZER if part == "layers." else "quantizer."
            return {prefix + key: value for key, value in state.items()}, name
    return state, name


def _schedule(lengths: Lengths) -> ak.ScaleSchedule:
    return lengths if isinstance(lengths, ak.ScaleSchedule) else ak.ScaleSchedule(lengths)


def _published_name(own: str) -> str:
    for theirs, ours in _WEIGHT_NORM.items():
        own = own.replace(ours, theirs)
    return own


def _shape_of(state: Mapping[str, Tensor], key: str, rank: int, name: str) -> tuple[int, ...]:
    return shape_of(state, key, rank, f"{name} is not a SAT checkpoint")


def _seanet_sizes(state: Mapping[str, Tensor], name: str) -> dict:
    (n_filters,) = _shape_of(state, "encoder.model.0.conv.conv.bias", 1, name)
    weight_norm = "encoder.model.0.conv.conv.weight_v" in state
    upsampling = re.compile(r"decoder\.model\.(\d+)\.convtr\.convtr\.bias")
    places = sorted(int(match[1]) for key in state if (match := upsampling.fullmatch(key)))
    weight = "weight_v" if weight_norm else "weight"
    kernels = [_shape_of(state, f"decoder.model.{i}.convtr.convtr.{weight}", 3, name)[2] for i in places]
    if not kernels:
        raise CheckpointError(f"{name} is not a SAT checkpoint: its decoder has no transposed convolution")
    lstm = re.compile(r"decoder\.model\.1\.lstm\.weight_ih_l\d+")
    return {
        "n_filters": n_filters,
        "ratios": tuple(kernel // 2 for kernel in kernels),
        "lstm_layers": max(1, sum(bool(lstm.fullmatch(key)) for key in state)),
        "weight_norm": weight_norm,
    }


def _seanet_shapes(sizes: Mapping) -> dict[str, tuple[int, ...]]:
    """This library's names and shapes of an encoder and a decoder of these sizes, without their memory."""
    arguments = [sizes[key] for key in ("dim", "n_filters", "ratios", "lstm_layers")]
    with torch.device("meta"):
        encoder = seanet_encoder(*arguments, weight_norm=sizes["weight_norm"])
        decoder = seanet_decoder(*arguments, weight_norm=sizes["weight_norm"])
    seanet = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    return {key: tuple(value.shape) for key, value in seanet.state_dict().items()}


def _quantizer_sizes(state: Mapping[str, Tensor], schedule: ak.ScaleSchedule, name: str) -> dict:
    size, latent = _shape_of(state, f"{_QUANTIZER}layers.0._codebook.embed", 2, name)
    layer = re.compile(re.escape(_QUANTIZER) + r"layers\.(\d+)\.")
    scales = 1 + max(int(match[1]) for key in state if (match := layer.match(key)))
    if scales != schedule.num_scales:
        raise CheckpointError(
            f"{name} has {scales} scales but {schedule.num_scales} lengths were given; "
            f"give the {scales} lengths that it was trained with"
        )
    projected = any(key.startswith(f"{_QUANTIZER}project_") for key in state)
    return {
        "dim": _shape_of(state, f"{_QUANTIZER}project_in.weight", 2, name)[1] if projected else latent,
        "latent_dim": latent,
        "codebook_size": size,
        "phi_kernel_sizes": tuple(_kernel_size(state.get(f"{place}weight")) for place in _phi_places(state)),
        "phi_sharing": _phi_sharing(state),
    }


def _kernel_size(weight: Tensor | None) -> int:
    """Phi's, which is centred and so of odd size: for anything else a size that the check then reports."""
    return weight.shape[2] | 1 if weight is not None and weight.dim() == 3 else 1


def _phi_sharing(state: Mapping[str, Tensor]) -> str:
    return next((how for how, pattern in _PHI.items() if any(map(pattern.match, state))), "partial")


def _phi_places(state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of phi's convolutions in order, up to the last that the checkpoint has a part of."""
    matches = [match for key in state if (match := _PHI[_phi_sharing(state)].match(key))]
    last = max(matches, key=lambda match: int(match[1] or 0), default=None)
    if last is None or not last[1]:
        return [last[0]] if last else []
    return [last[0].replace(f".{last[1]}.", f".{k}.") for k in range(int(last[1]) + 1)]


def _quantizer_shapes(
    state: Mapping[str, Tensor], schedule: ak.ScaleSchedule, sizes: Mapping
) -> dict[str, tuple[int, ...]]:
    """The published names and shapes of a quantizer of these sizes."""
    size, latent, dim = sizes["codebook_size"], sizes["latent_dim"], sizes["dim"]
    shapes = {}
    for s in range(schedule.num_scales):
        codebook = f"{_QUANTIZER}layers.{s}._codebook."
        shapes |= {
            f"{codebook}inited": (1,),
            f"{codebook}cluster_size": (size,),
            f"{codebook}embed": (size, latent),
        }
        if f"{codebook}embed_avg" in state:
            shapes[f"{codebook}embed_avg"] = (size, latent)
    for place, kernel in zip(_phi_places(state), sizes["phi_kernel_sizes"], strict=True):
        shapes |= {f"{place}weight": (latent, latent, kernel), f"{place}bias": (latent,)}
    if dim != latent:
        shapes |= {f"{_QUANTIZER}project_in.weight": (latent, dim), f"{_QUANTIZER}project_in.bias": (latent,)}
        shapes |= {f"{_QUANTIZER}project_out.weight": (dim, latent), f"{_QUANTIZER}project_out.bias": (dim,)}
    return shapes


def _quantizer_state(state: Mapping[str, Tensor], schedule: ak.ScaleSchedule) -> dict[str, Tensor]:
    """A checked published quantizer under this library's names."""
    codebooks = [f"{_QUANTIZER}layers.{s}._codebook." for s in range(schedule.num_scales)]
    embed = [state[f"{book}embed"] for book in codebooks]
    cluster_size = [state[f"{book}cluster_size"] for book in codebooks]
    # A sum of rows that would give exactly this codebook, where the checkpoint left its own out.
    implied = [rows * hits[:, None] for rows, hits in zip(embed, cluster_size, strict=True)]
    embed_avg = [state.get(f"{book}embed_avg", sums) for book, sums in zip(codebooks, implied, strict=True)]
    ours = {
        "codebooks": torch.stack(embed),
        "cluster_size": torch.stack(cluster_size),
        "embed_avg": torch.stack(embed_avg),
        "initialized": torch.stack([state[f"{book}inited"] for book in codebooks]).bool().all(),
    }
    for k, place in enumerate(_phi_places(state)):
        ours |= {f"phi.{k}.{part}": state[f"{place}{part}"] for part in ("weight", "bias")}
    projection = f"{_QUANTIZER}project_"
    ours |= {
        key.removeprefix(_QUANTIZER): value for key, value in state.items() if key.startswith(projection)
    }
    return ours
