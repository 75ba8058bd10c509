"""Whether two ways to run an AAR compute the same: what the benchmarks ask before they measure anything."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import aar_kernels as ak
from aar import AAR
from aar.baselines import NextToken, PlainAAR
from aar.models import generation


def difference(fast: Tensor, plain: Tensor, exact: Tensor) -> str:
    """Empty where ``fast`` is at most twice as far from ``exact`` as ``plain``, and one rounding.

    Args:
        exact: the same in float64.
        plain: the same in plain PyTorch, in the dtype of ``fast``.
    """
    error, allowed = _largest(fast - exact), _allowed(plain, exact)
    return "" if error <= allowed else f"off by {error:.2g}, allowed {allowed:.2g}"


def _allowed(plain: Tensor, exact: Tensor) -> float:
    return 2 * (_largest(plain - exact) + torch.finfo(plain.dtype).eps * _largest(exact))


def _largest(x: Tensor) -> float:
    return x.detach().double().abs().max().item()


class Truth:
    """Teacher-forced logits of a model with and without condition by plain PyTorch: in its dtype (or under autocast),
    and in float64."""

    def __init__(self, model: AAR, condition: Tensor, *, autocast: torch.dtype | None = None):
        self.model, self.double, self.autocast = model, copy.deepcopy(model).double(), autocast
        self.condition = torch.cat([condition, model.null_condition.expand_as(condition)])
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Both ``[2 B, total, codebook_size]``, the conditional items first, of ``codes[B, total]``."""
        key = tuple(codes.flatten().tolist())
        if key not in self._known:
            self._known[key] = self._logits(self.model, codes, self.autocast), self._logits(self.double, codes, None)
        return self._known[key]

    def _logits(self, model: AAR, codes: Tensor, autocast: torch.dtype | None) -> Tensor:
        inputs = model.quantizer.next_scale_inputs(codes.repeat(2, 1), backend="reference")
        return PlainAAR(model, autocast=autocast).forward(self.condition.to(inputs.dtype), inputs)

    def guided(self, logits: Tensor, cfg: float) -> Tensor:
        """``[B, total, codebook_size]``, as sampling guides each scale."""
        cond, uncond = logits.chunk(2)
        schedule = self.model.schedule
        t = cfg * schedule.scale_of_token().to(cond.device)[:, None] / max(schedule.num_scales - 1, 1)
        return (1 + t) * cond - t * uncond


def check_greedy(truth: Truth, codes: Tensor, cfg: float) -> str:
    """What is wrong with ``codes[B, total]`` that were sampled at temperature 0, or nothing.

    Each must be the likeliest of float64 after the codes before it, but for what rounding may hide.
    """
    plain, exact = (truth.guided(logits, cfg) for logits in truth(codes))
    short = _largest(exact.amax(-1) - exact.gather(-1, codes[..., None])[..., 0])
    allowed = 2 * _allowed(plain, exact)  # of the code taken and of the one it was preferred to
    return "" if short <= allowed else f"a greedy code's logit is {short:.2g} below the largest, allowed {allowed:.2g}"


def check_weights(truth: Truth, codes: Tensor, cfg: float, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    """Cached logits with weights kept in ``dtype``, against plain PyTorch on weights that were rounded to it, under
    autocast where activations are narrow too.

    Args:
        truth: of the model as it is.
        codes: ``[B, total]``, the teacher's.

    Returns:
        What is wrong, or nothing; and what the rounding does to the logits: ``max`` and ``rms`` of their difference
        from float64's, ``rms_of_logits``, and the share of guided codes at temperature 0 that stay the same.
    """
    model, own = truth.model, truth
    if dtype != torch.float32:
        own = Truth(rounded(model, dtype), truth.condition[: len(codes)], autocast=autocast_of(model, dtype))
    inputs = model.quantizer.next_scale_inputs(codes.repeat(2, 1))
    ours, exact = cached_logits(model, truth.condition, inputs, dtype), truth(codes)[1]
    error = ours - exact
    same = truth.guided(ours, cfg).argmax(-1) == truth.guided(exact, cfg).argmax(-1)
    effects = {
        "max": _largest(error),
        "rms": error.square().mean().sqrt().item(),
        "rms_of_logits": exact.square().mean().sqrt().item(),
        "same_codes": same.double().mean().item(),
    }
    return difference(ours, *own(codes)), effects


def autocast_of(model: AAR, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of activations in sampling with weights in ``dtype``, where it is not the model's own."""
    activations = generation.engine_of(model, dtype).dtype
    return None if activations == model.position.dtype else activations


@torch.no_grad()
def rounded(model: AAR, dtype: torch.dtype) -> AAR:
    """A copy whose linear layers have what ``dtype`` leaves of their weights in sampling."""
    model = copy.deepcopy(model)
    layers = [model.word, model.head]
    for block in model.blocks:
        layers += [block.qkv, block.proj, block.fc1, block.fc2]
    for layer in layers:
        layer.weight.copy_(ak.linear.pack(layer.weight, dtype=dtype).dequantize())
    return model


@torch.no_grad()
def cached_logits(model: AAR, condition: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Teacher-forced logits ``[B, total, codebook_size]`` scale by scale, as sampling computes them."""
    run = generation.Run(model, generation.engine_of(model, dtype), condition, guided=False)
    scales = [None, *inputs.split(model.schedule.lengths[1:], dim=1)]
    return torch.cat([run.logits(scale, rows)[0] for scale, rows in enumerate(scales)], dim=1)


@torch.no_grad()
def check_next_token(ours: NextToken, condition: Tensor, dtype: torch.dtype, *, tokens: int = 24) -> str:
    """What is wrong with the logits token by token, or nothing: they must be those of one causal pass over all."""
    model, autocast = rounded(ours.model, dtype), autocast_of(ours.model, dtype)
    shape = len(condition), min(tokens, ours.length)
    codes = torch.randint(model.config.codebook_size, shape, device=condition.device)
    ours.begin(condition)
    before = [None, *codes.unbind(dim=1)[:-1]]
    logits = torch.stack([ours.logits(position, picks) for position, picks in enumerate(before)], dim=1)
    with torch.autocast(condition.device.type, autocast, enabled=autocast is not None):
        plain = ours.causal_logits(model, condition, codes)
    return difference(logits, plain, ours.causal_logits(model.double(), condition, codes))
