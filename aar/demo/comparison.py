"""The fast path against plain PyTorch and next-token prediction on this machine: first equal codes, then time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import aar_kernels as ak

from ..baselines import Fused, NextToken, Plain, PlainAAR
from ..models import AAR, SAT
from . import page

PLAIN = "reference"
SECONDS = 2.0
"""For each group of calls that are timed in turn."""
CODEBOOKS = 10
"""Of a residual codec at the same frame rate, whose tokens a next-token model makes one after the other."""


@dataclass(frozen=True)
class Agreement:
    """How the codes of two float32 encoders compare.

    Attributes:
        windows: how many were encoded.
        equal: windows whose codes are all equal.
        ties: windows that part where float64 finds the two codes closer than float32 can tell.
        wrong: all others. Only these are errors.
    """

    windows: int
    equal: int
    ties: int
    wrong: int

    def __str__(self) -> str:
        parts = [f"equal in {self.equal} of {self.windows} windows"]
        if self.ties:
            parts.append(f"{self.ties} part at a tie that float32 cannot tell")
        if self.wrong:
            parts.append(f"{self.wrong} WRONG")
        return ", ".join(parts)


@torch.no_grad()
def compare_codes(quantizer: ak.nn.MultiScaleResidualQuantizer, latents: Tensor) -> Agreement:
    """Encodes latents [B, dim, T] on both paths, and judges each difference in float64."""
    fast = quantizer.encode(latents)
    plain = quantizer.encode(latents, backend=PLAIN)
    differing = (fast != plain).any(dim=1).nonzero().flatten()
    exact = copy.deepcopy(quantizer).double()
    ties = sum(_is_tie(exact, latents[i, None].double(), fast[i, None], plain[i, None]) for i in differing)
    return Agreement(len(fast), len(fast) - len(differing), ties, len(differing) - ties)


def _is_tie(
    quantizer: ak.nn.MultiScaleResidualQuantizer, latents: Tensor, fast: Tensor, plain: Tensor
) -> bool:
    """Whether, at the first scale where codes [1, total] differ, their distances agree to float32 rounding.

    Later scales quantize another residual, so nothing can be said about them.
    """
    target = quantizer.project_in(latents.mT)
    f_hat = torch.zeros_like(target)
    lengths = quantizer.schedule.lengths
    for scale, (ours, theirs) in enumerate(zip(fast.split(lengths, 1), plain.split(lengths, 1), strict=True)):
        if (ours != theirs).any():
            break
        f_hat, _ = quantizer.step(scale, f_hat, ours, backend=PLAIN)
    rows = F.adaptive_avg_pool1d((target - f_hat).mT, lengths[scale]).mT
    codebook = quantizer.codebooks[scale]
    gap = (rows - codebook[ours]).square().sum(-1) - (rows - codebook[theirs]).square().sum(-1)
    # Either distance sums `latent` products, and its residual was rounded at each scale before.
    reach = rows.norm(dim=-1) + codebook.norm(dim=-1).max()
    rounding = quantizer.latent_dim * reach + 2 * scale * target.norm(dim=-1).max()
    bound = 2 * torch.finfo(torch.float32).eps * reach * rounding
    return bool((gap.abs() <= bound).all())


@dataclass(frozen=True)
class Timing:
    """Median seconds of one call."""

    plain: float
    fast: float

    @property
    def speedup(self) -> float:
        return self.plain / self.fast


def time_both(call: Callable[[], object]) -> Timing:
    """Times a call with either backend."""

    def run(backend: str | None) -> None:
        with ak.use_backend(backend):
            call()

    return Timing(*medians([lambda: run(PLAIN), lambda: run(None)]))


def medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each call, run in turn for `SECONDS`, so that what else the machine does falls on all alike.

    The first run of each, which builds tables and picks kernels, does not count.
    """
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS
    while len(samples[0]) < 6 or time.perf_counter() < end:
        for call, times in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in samples]


@torch.no_grad()
def quantizer_table(sat: SAT, wave: Tensor, windows: int = 8) -> page.Table:
    """Codes and times of both paths, on the latents of a wave [N].

    All windows of the wave are compared, the first `windows` of them (fewer if there are not so many) timed.
    """
    pieces = sat.windows().split(wave[None])[0].unsqueeze(1)
    latents = torch.cat([sat.encoder(part) for part in pieces.split(windows)])
    agreement = compare_codes(sat.quantizer, latents)
    pieces, latents = pieces[:windows], latents[:windows]
    codes = sat.quantizer.encode(latents)
    calls = {
        "quantizer encode, 1 window": lambda: sat.quantizer.encode(latents[:1]),
        f"quantizer encode, {len(latents)} windows": lambda: sat.quantizer.encode(latents),
        "quantizer decode, 1 window": lambda: sat.quantizer.decode(codes[:1]),
        "whole encode, 1 window": lambda: sat.encode(pieces[:1]),
    }
    rows = []
    for name, call in calls.items():
        timing = time_both(call)
        times = [f"{1000 * timing.plain:.2f} ms", f"{1000 * timing.fast:.2f} ms", f"{timing.speedup:.1f} x"]
        rows.append([name, *times])
    backend = ak.dispatch.select("msrq_encode", latents)
    caption = f"Median time, CPU threads: {torch.get_num_threads()}. Codes: {agreement}."
    if backend == PLAIN:
        caption += " No faster backend runs here; python -m aar_kernels.info says why."
    return page.Table(caption, ["", "plain PyTorch", f"fast path: {backend}", "faster by"], rows)


@torch.no_grad()
def generation_table(aar: AAR, condition: Tensor) -> page.Table:
    """Times of a window of sound made from a condition [1, dim]: all codes of a scale at once, or one after the other.

    The next-token rows have the weights of this model, to make as many codes as a residual codec has in a window: only
    their time means anything.
    """
    plain, tokens = PlainAAR(aar), CODEBOOKS * aar.schedule.length
    ours, theirs = aar.sample(condition, temperature=0), plain.generate(condition, temperature=0)
    times = medians([lambda: aar.sample(condition), lambda: plain.generate(condition)])
    times += [_time_tokens(kind(aar, tokens), condition) for kind in (Fused, Plain)]
    names = (
        f"next scale, {aar.schedule.num_scales} steps: the fast path", "the same in plain PyTorch",
        f"next token, {tokens} steps: the fast path", "the same in plain PyTorch",
    )  # fmt: skip
    rows = [[name, f"{1000 * t:.0f} ms", f"{t / times[0]:.1f} x"] for name, t in zip(names, times, strict=True)]
    equal = int((ours == theirs).sum())
    caption = (
        f"Making {aar.schedule.length} frames with guidance, CPU threads: {torch.get_num_threads()}. "
        f"Codes of the first two rows, without chance: equal in {equal} of {ours.numel()}."
    )
    return page.Table(caption, ["", "time", "of the first"], rows)


def _time_tokens(model: NextToken, condition: Tensor) -> float:
    """Seconds of one whole sequence, after a short one."""
    for length in (min(20, model.length), model.length):
        start = time.perf_counter()
        model.begin(condition)
        codes = None
        for position in range(length):
            codes = model.step(position, codes, cfg=4.0)
        spent = time.perf_counter() - start
    return spent
