"""Models and recordings with which a step takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from aar import SAT, SATConfig
from aar.training.aar import AARTask
from aar.training.config import (
    AARTraining,
    CheckpointConfig,
    DataConfig,
    DiscriminatorConfig,
    LoggingConfig,
    OptimizerConfig,
    SATTraining,
    ScheduleConfig,
    TransformerConfig,
)
from aar.training.loop import Trainer
from aar.training.sat import SATTask
from aar.training.world import World

# 0.16 s a window: the longest window of the losses, 2048, must fit.
TINY = SATConfig(
    n_filters=2, ratios=(8, 5, 4, 2), dim=12, latent_dim=6, lengths=(1, 3, 6, 12), codebook_size=16,
    phi_kernel_sizes=(3, 5), lstm_layers=1, straight_through="once", codebook_decay=0.9, dead_code_threshold=0.0,
)  # fmt: skip


def sat_config(**changes) -> SATTraining:
    config = SATTraining(
        model=TINY,
        data=DataConfig(batch_size=4, workers=0),
        optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99)),
        schedule=ScheduleConfig(steps=20, warmup=5),
        logging=LoggingConfig(every=1, sounds_every=0),
        checkpoint=CheckpointConfig(every=100),
        discriminator=DiscriminatorConfig(enabled=False),
        initial_loudness=0.2,
        ema=0.9,
    )
    return replace(config, **changes)


def aar_config(**changes) -> AARTraining:
    config = AARTraining(
        tokens="unused",
        model=TransformerConfig(depth=2, width=32, heads=2, condition_drop=0.0),
        data=DataConfig(batch_size=4, workers=0),
        optimizer=OptimizerConfig("adamw", 3e-3, (0.9, 0.95), weight_decay=0.05, clip=2.0),
        schedule=ScheduleConfig(steps=20, warmup=5),
        logging=LoggingConfig(every=1, sounds_every=0),
        checkpoint=CheckpointConfig(every=100),
    )
    return replace(config, **changes)


def chords(number: int, items: int, samples: int = TINY.window_samples) -> torch.Tensor:
    """Batch `number` of random chords, [items, 1, samples]."""
    generator = torch.Generator().manual_seed(number)
    pitch = 200 * 2 ** (2 * torch.rand(items, 3, 1, generator=generator))
    phase = 2 * torch.pi * torch.rand(items, 3, 1, generator=generator)
    time = torch.arange(samples) / TINY.sample_rate
    return 0.2 * torch.sin(2 * torch.pi * pitch * time + phase).sum(1, keepdim=True)


def bursts(number: int, items: int, samples: int = TINY.window_samples) -> torch.Tensor:
    """Batch `number` of noises an octave wide, [items, 1, samples]: six octaves, 30 dB; nothing is near to them all."""
    generator = torch.Generator().manual_seed(number)
    spectrum = torch.fft.rfft(torch.randn(items, 1, samples, generator=generator))
    frequency = torch.arange(spectrum.shape[-1]) * TINY.sample_rate / samples
    centre = 150 * 2 ** (6 * torch.rand(items, 1, 1, generator=generator))
    spectrum = spectrum * torch.exp(-((2 * torch.log2(frequency.clamp(min=1) / centre)) ** 2))
    wave = torch.fft.irfft(spectrum, n=samples)
    loudness = 0.3 * 10 ** (-1.5 * torch.rand(items, 1, 1, generator=generator))
    return loudness * wave / wave.square().mean(-1, keepdim=True).sqrt()


def chord_batches(start: int = 0, items: int = 4, rank: int = 0, world: int = 1) -> Iterator[dict]:
    """As `aar.data.Crops`: batches of all ranks, one after the other, are those of one process."""
    while True:
        yield {"wav": chords(start, items * world)[rank * items : (rank + 1) * items]}
        start += 1


def on_chords(task: SATTask | AARTask, batches=None) -> SATTask | AARTask:
    """The task, with `batches(start)` for its data, or else all chords of the world."""

    def of_world(world: World, start: int) -> Iterator[dict]:
        return chord_batches(start, task.config.data.batch_size, world.rank, world.size)

    task.batches = of_world if batches is None else lambda world, start: batches(start)
    return task


def train_sat(config: SATTraining, out: Path, batches=None) -> Trainer:
    trainer = Trainer(on_chords(SATTask(config, World()), batches), config, out, World())
    trainer.run()
    return trainer


def write_recordings(folder: Path, count: int = 4, seconds: float = 0.6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        wave = chords(number, 1, round(seconds * TINY.sample_rate))[0, 0]
        soundfile.write(folder / f"{number}.wav", wave.numpy().astype(np.float32), TINY.sample_rate)
    return folder


def write_yaml(path: Path, **settings) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


SAT_YAML = {
    "model": {"n_filters": 2, "dim": 12, "latent_dim": 6, "lengths": [1, 3, 6, 12], "codebook_size": 16,
              "phi_kernel_sizes": [3, 5], "lstm_layers": 1, "codebook_decay": 0.9, "dead_code_threshold": 0.05},
    "data": {"batch_size": 2, "workers": 0},
    "discriminator": {"filters": 2},
    "schedule": {"steps": 6, "warmup": 2},
    "logging": {"every": 1, "sounds_every": 3},
    "checkpoint": {"every": 2, "keep": 2},
}  # fmt: skip
AAR_YAML = {
    "model": {"depth": 1, "width": 16, "heads": 2},
    "data": {"batch_size": 2, "workers": 0},
    "schedule": {"steps": 4, "warmup": 1},
    "logging": {"every": 1, "sounds_every": 2},
    "checkpoint": {"every": 2},
}


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    theirs = theirs.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def tiny_sat() -> SAT:
    torch.manual_seed(0)
    return SAT(TINY).eval()
