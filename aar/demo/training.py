"""Trains the demo's small SAT on a handful of clips, for a few minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..models import SAT
from ..training.initialization import initialize_tokenizer
from ..training.losses import ReconstructionLoss
from ..training.usage import CodebookUsage

BATCH = 4
LEARNING_RATE = 2e-3

WARM_UP = 0.05
"""Part of the training during which the learning rate rises; then it falls as a cosine."""

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit}{postfix}"


def crops(clips: Sequence[Tensor], size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless random crops [BATCH, 1, size] of waves [N], longer clips more often.

    A crop may run over the end by up to half its size, into zeros, as the last window of a recording does.
    """
    lengths = torch.tensor([float(len(clip)) for clip in clips])
    padded = [F.pad(clip, (0, size)) for clip in clips]
    while True:
        chosen = torch.multinomial(lengths, BATCH, replacement=True, generator=generator)
        starts = torch.rand(BATCH, generator=generator) * (lengths[chosen] - size / 2).clamp(min=1.0)
        places = zip(chosen.tolist(), starts.long().tolist(), strict=True)
        yield torch.stack([padded[i][start : start + size] for i, start in places]).unsqueeze(1)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then cosine; `progress` from 0 to 1."""
    return LEARNING_RATE * min(1.0, progress / WARM_UP + 0.02) * (0.5 + 0.5 * math.cos(math.pi * progress))


def train(
    sat: SAT, clips: Sequence[Tensor], *, minutes: float, steps: int | None = None, seed: int = 0
) -> list[float]:
    """Trains a fresh SAT in place, leaves it in evaluation mode and returns the loss of every step.

    Args:
        clips: waves [N] at the model's rate.
        minutes: of wall clock, unless `steps` is given. Only with `steps` do two runs end alike.
    """
    initialize_tokenizer(sat)
    criterion = ReconstructionLoss(sat.config.sample_rate)
    optimizer = torch.optim.Adam(sat.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    batches = crops(clips, sat.config.window_samples, torch.Generator().manual_seed(seed))
    usage, losses = CodebookUsage(sat.config.schedule, sat.config.codebook_size), []
    sat.train()
    unit = "s" if steps is None else "steps"
    with tqdm(total=steps or 60 * minutes, desc="training", unit=unit, bar_format=BAR) as bar:
        for progress, wave in zip(_progress(bar, by_steps=steps is not None), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress)
            estimate, codes, commitment = sat(wave)
            loss = criterion(estimate, wave).total + commitment
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(sat.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            usage.update(codes)
            numbers = {"loss": f"{losses[-1]:.2f}", "codes in use": f"{usage.part():.0%}"}
            bar.set_postfix(numbers, refresh=False)
    sat.eval()
    return losses


def _progress(bar: tqdm, by_steps: bool) -> Iterator[float]:
    """Progress 0 to 1, until as many steps or seconds have passed as the bar holds."""
    start, done = time.perf_counter(), 0.0
    while done < bar.total:
        yield done / bar.total
        done = done + 1 if by_steps else time.perf_counter() - start
        bar.update(min(done, bar.total) - bar.n)
