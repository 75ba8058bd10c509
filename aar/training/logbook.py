"""What a training says: a progress bar, metrics.jsonl, tensorboard where it is installed, wandb where asked for."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..atomic import replacing
from ..audio.mel import LogMelSpectrogram
from ..errors import AarError
from .config import TrainingConfig

__all__ = ["Logbook"]

DYNAMIC_RANGE = 6.5
"""log10 of power shown below the loudest point: 65 dB."""


class Logbook:
    """A context; `show` moves the bar, `numbers` and `sounds` are kept.

    Args:
        directory: of the run; metrics.jsonl in it holds one object a line, with "step".
        start: steps done before. What is written of later steps, by a run that was killed, is removed.

    Raises:
        AarError: wandb is asked for, and not installed or not ready.
    """

    def __init__(self, directory: Path, config: TrainingConfig, start: int, sample_rate: int):
        self.wandb = _wandb(directory, config, start)
        self.path, self.sample_rate = directory / "metrics.jsonl", sample_rate
        self.spectrogram = LogMelSpectrogram(1024, 256, 80, sample_rate, floor=1e-9)
        self.shown: dict[str, str] = {}
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
        with replacing(self.path) as path:
            path.write_text("".join(kept))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115
        self.tensorboard = _tensorboard(directory, start)
        interval = 0.1 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=config.schedule.steps, initial=start, desc="training", unit=" steps",
                        mininterval=interval, dynamic_ncols=True)  # fmt: skip

    def show(self, numbers: Mapping[str, float]) -> None:
        """One step more, and what it gave; of each player the loss alone."""
        shown = {name: value for name, value in numbers.items() if "/" not in name or name.endswith("/loss")}
        self.shown |= {name.removesuffix("/loss"): f"{value:.3g}" for name, value in shown.items()}
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, value in numbers.items():
            if self.tensorboard:
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(numbers), step=step)

    def sounds(self, step: int, sounds: Mapping[str, Tensor]) -> None:
        """Waves [N], to hear and as spectrograms."""
        for name, wave in sounds.items():
            wave = wave.detach().float().cpu().clamp(-1, 1)
            mel = self.spectrogram(wave)
            picture = ((mel - mel.max()) / DYNAMIC_RANGE + 1).clamp(0, 1).flip(0)
            if self.tensorboard:
                self.tensorboard.add_audio(name, wave[None], step, self.sample_rate)
                self.tensorboard.add_image(name, picture[None], step)
            if self.wandb:
                import wandb

                audio, image = wandb.Audio(wave.numpy(), self.sample_rate), wandb.Image(picture.numpy())
                self.wandb.log({name: audio, f"{name}, spectrogram": image}, step=step)

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if kind is None else 1)


def _tensorboard(directory: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)


def _wandb(directory: Path, config: TrainingConfig, start: int):
    """A run of its own for each directory, which goes on where the training does."""
    if config.logging.wandb is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise AarError(f"logging.wandb: {error}; pip install wandb, or logging.wandb=null") from None
    kept = directory / "wandb-id.txt"
    identity = kept.read_text() if start and kept.exists() else secrets.token_hex(4)
    with replacing(kept) as path:
        path.write_text(identity)
    try:
        return wandb.init(project=config.logging.wandb, dir=str(directory), config=asdict(config), resume="allow",
                          id=identity)  # fmt: skip
    except wandb.Error as error:
        raise AarError(f"logging.wandb: {str(error).splitlines()[0]}") from None
