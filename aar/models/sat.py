"""SAT, the scale-level audio tokenizer: SEANet encoder, multi-scale residual quantizer, SEANet decoder.

Source: arXiv 2408.09027, section 3.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils import parametrize

import aar_kernels as ak

from . import inference
from .pretrained import Pretrained, config_from_dict
from .seanet import seanet_decoder, seanet_encoder
from .windows import Windows

__all__ = ["SAT", "SATConfig"]

# Bounds the memory of a long recording: a window of the published size takes about 25 MB of activations.
WINDOWS_PER_BATCH = 8


@dataclass(frozen=True)
class SATConfig:
    """Sizes of a SAT. The defaults are the published model of latent 64: 21.6 M parameters, 455 tokens/s.

    Attributes:
        sample_rate: of the waves, in Hz.
        n_filters: channels of the first encoder convolution; they double at each ratio.
        ratios: strides of the decoder, first to last; their product is the samples per latent frame.
        lstm_layers: layers of each of the two LSTMs.
        dim: channels of the encoder's output.
        latent_dim: channels in which codes are searched; without a projection where it equals dim.
        lengths: tokens of each scale; the last is also the number of latent frames of a window.
        codebook_size: codes per codebook.
        phi_kernel_sizes: one odd kernel size per phi convolution; () for no phi.
        phi_sharing: "none" (one phi per scale), "partial" or "full".
        shared_codebook: one codebook for all scales.
        metric: "euclidean" or "cosine".
        straight_through: "per_scale" (the published training) or "once".
        codebook_decay: of the moving averages that codebooks are, per training step.
        dead_code_threshold: in training, a code with fewer hits per step than this is replaced; 0: never.
        weight_norm: whether convolutions hold weight norm's two factors, to train, or their product.

    Raises:
        ValueError: a size below one, or fewer than four frames in a window: too few for reflect padding.
    """

    sample_rate: int = 24000
    n_filters: int = 32
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    lstm_layers: int = 2
    dim: int = 1024
    latent_dim: int = 64
    lengths: tuple[int, ...] = field(default_factory=lambda: ak.ScaleSchedule.quadratic(16, 75).lengths)
    codebook_size: int = 1024
    phi_kernel_sizes: tuple[int, ...] = (9,) * 6
    phi_sharing: str = "partial"
    shared_codebook: bool = False
    metric: str = "euclidean"
    straight_through: str = "per_scale"
    codebook_decay: float = 0.99
    dead_code_threshold: float = 2.0
    weight_norm: bool = True

    def __post_init__(self):
        for name in ("ratios", "lengths", "phi_kernel_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("sample_rate", "n_filters", "lstm_layers", "dim", "latent_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios must be positive strides, got {self.ratios}")
        if self.schedule.length < 4:
            raise ValueError(f"a window needs at least four latent frames, got lengths {self.lengths}")

    @property
    def schedule(self) -> ak.ScaleSchedule:
        return ak.ScaleSchedule(self.lengths)

    @property
    def window_samples(self) -> int:
        """Samples of one window: one second in the published models."""
        return math.prod(self.ratios) * self.schedule.length

    @classmethod
    def from_dict(cls, values: dict) -> SATConfig:
        """The inverse of dataclasses.asdict, also through JSON.

        Raises:
            ValueError: a name that is not an attribute, or a value that no SAT can have.
        """
        return config_from_dict(cls, values)


class SAT(Pretrained):
    """Audio tokenizer of windows of `config.window_samples` samples (one second as published).

    Longer and shorter waves are cut into windows, the last filled with zeros, so that any length works. With
    `overlap` seconds neighbouring windows share samples and are cross-faded, so that no seam is heard; pass
    the same `overlap` to `encode` and `decode`. `progress`, where a method takes it, is called with the
    number of windows that have just been finished.

    Waves are floating point at `config.sample_rate` and are converted to the model's dtype.
    """

    config_class = SATConfig
    kind = "sat"

    def __init__(self, config: SATConfig | None = None):
        super().__init__()
        self.config = config = config or SATConfig()
        sizes = (config.dim, config.n_filters, config.ratios, config.lstm_layers)
        self.encoder = seanet_encoder(*sizes, weight_norm=config.weight_norm)
        self.decoder = seanet_decoder(*sizes, weight_norm=config.weight_norm)
        self.quantizer = ak.nn.MultiScaleResidualQuantizer(
            config.dim,
            schedule=config.schedule,
            codebook_size=config.codebook_size,
            latent_dim=config.latent_dim,
            phi_kernel_sizes=config.phi_kernel_sizes,
            phi_sharing=config.phi_sharing,
            shared_codebook=config.shared_codebook,
            metric=config.metric,
            straight_through=config.straight_through,
            decay=config.codebook_decay,
            dead_code_threshold=config.dead_code_threshold,
        )

    @property
    def num_scales(self) -> int:
        return len(self.config.lengths)

    def windows(self, overlap: float = 0.0) -> Windows:
        """Where windows lie when neighbours share `overlap` seconds.

        Raises:
            ValueError: not 0 to half a window.
        """
        if not math.isfinite(overlap):
            raise ValueError(f"overlap must be a number of seconds, got {overlap}")
        return Windows(self.config.window_samples, round(overlap * self.config.sample_rate))

    def forward(self, wav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training pass over whole windows; updates the codebooks where the module is in training mode.

        Args:
            wav: [B, 1, window_samples], floating point.

        Returns:
            The reconstruction [B, 1, window_samples], codes [B, total] int64, and the scalar commitment loss.

        Raises:
            ValueError: another shape.
        """
        if wav.dim() != 3 or tuple(wav.shape[1:]) != (1, self.config.window_samples):
            raise ValueError(f"wav must be [B, 1, {self.config.window_samples}], got {list(wav.shape)}")
        quantized, codes, loss = self.quantizer(self.encoder(wav))
        return self.decoder(quantized), codes, loss

    @torch.no_grad()
    def encode(
        self, wav: Tensor, overlap: float = 0.0, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Tokenizes: [B, 1, N] -> codes [B, windows, total] int64, the scales of a window in schedule order.

        Raises:
            ValueError: not [B, 1, N] with B and N at least 1, not floating point, NaN or infinite samples, or
                an overlap above half a window.
        """
        if wav.dim() != 3 or wav.shape[1] != 1 or 0 in wav.shape:
            raise ValueError(f"wav must be [B, 1, N] with B and N at least 1, got {list(wav.shape)}")
        if not wav.is_floating_point():
            raise ValueError(f"wav must be floating point in -1..1, got {wav.dtype}")
        if not torch.isfinite(wav).all():
            raise ValueError("wav holds NaN or infinite samples")
        windows = self.windows(overlap).split(wav.squeeze(1).to(self._dtype))
        codes = []
        with self._folded():
            for part in windows.flatten(0, 1).unsqueeze(1).split(WINDOWS_PER_BATCH):
                codes.append(inference.graphed(self._codes_of, part, self._weights))
                _advance(progress, len(part))
        return torch.cat(codes).unflatten(0, windows.shape[:2])

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        num_samples: int | None = None,
        overlap: float = 0.0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Synthesizes: codes [B, windows, total] int64 -> wave [B, 1, num_samples].

        Code -1 adds nothing at its place, as in the quantizer.

        Args:
            num_samples: length of the wave that was encoded; all that the windows cover if None.

        Raises:
            ValueError: another shape or dtype, a `num_samples` that takes another number of windows, or an
                overlap above half a window.
            RuntimeError: a code outside the codebook.
        """
        waves = lambda part: iter((inference.graphed(self._waves_of, part, self._weights),))  # noqa: E731
        return self._synthesize(codes, num_samples, overlap, 1, waves, progress)[0]

    @torch.no_grad()
    def decode_scales(
        self,
        codes: Tensor,
        scales: Sequence[int] | None = None,
        num_samples: int | None = None,
        overlap: float = 0.0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """What the coarsest scales alone sound like.

        Args:
            codes: [B, windows, total] int64.
            scales: how many scales to keep, once per wave wanted, each 1 to num_scales; all of them if None.
            num_samples: as in `decode`.

        Returns:
            [len(scales), B, 1, num_samples].

        Raises:
            ValueError, RuntimeError: as in `decode`, or a scale count out of range.
        """
        scales = tuple(range(1, self.num_scales + 1) if scales is None else scales)
        if not scales or not all(1 <= kept <= self.num_scales for kept in scales):
            raise ValueError(f"scales must be one or more of 1 to {self.num_scales}, got {scales}")

        def waves(part: Tensor) -> Iterator[Tensor]:
            after_each = self.quantizer.decode_scales(part)
            return (inference.run(self.decoder, after_each[kept - 1]) for kept in scales)

        return self._synthesize(codes, num_samples, overlap, len(scales), waves, progress)

    def reconstruct(self, wav: Tensor, overlap: float = 0.0) -> Tensor:
        """`decode(encode(wav))`: [B, 1, N] -> [B, 1, N]. Raises as they do."""
        return self.decode(self.encode(wav, overlap), wav.shape[-1], overlap)

    def reconstruct_scales(
        self, wav: Tensor, scales: Sequence[int] | None = None, overlap: float = 0.0
    ) -> Tensor:
        """`decode_scales(encode(wav), scales)`: [B, 1, N] -> [len(scales), B, 1, N]. Raises as they do."""
        return self.decode_scales(self.encode(wav, overlap), scales, wav.shape[-1], overlap)

    def fold_weight_norm(self) -> SAT:
        """Replaces weight norm's two factors by their product, for good; returns the module.

        Inference methods compute the product once per call; this saves a model of many short calls even that.
        """
        for module in list(self.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.config = replace(self.config, weight_norm=False)
        return self

    def fingerprint(self) -> str:
        """Sixteen hex digits of the codebooks: tokens mean the same to models in which they are equal."""
        codebooks = self.quantizer.codebooks.detach().float().contiguous().cpu()
        return hashlib.sha256(codebooks.numpy().tobytes()).hexdigest()[:16]

    @property
    def _dtype(self) -> torch.dtype:
        return self.quantizer.codebooks.dtype

    @property
    def _weights(self) -> list[Tensor]:
        return [*self.parameters(), self.quantizer.codebooks]

    def _codes_of(self, windows: Tensor) -> Tensor:
        return self.quantizer.encode(inference.run(self.encoder, windows))

    def _waves_of(self, codes: Tensor) -> Tensor:
        return inference.run(self.decoder, self.quantizer.decode(codes))

    def _folded(self):
        """Weight norm's product is computed once inside this block and forgotten after it: never stale."""
        return parametrize.cached()

    def _synthesize(
        self,
        codes: Tensor,
        num_samples: int | None,
        overlap: float,
        versions: int,
        waves: Callable[[Tensor], Iterator[Tensor]],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """Joins windows, of which `waves` gives `versions` each: [versions, B, 1, num_samples]."""
        total = self.config.schedule.total
        if codes.dim() != 3 or codes.shape[2] != total or 0 in codes.shape or codes.dtype != torch.int64:
            raise ValueError(
                f"codes must be int64 [B, windows, {total}] with B and windows at least 1, "
                f"got {codes.dtype} {list(codes.shape)}"
            )
        batch, count, _ = codes.shape
        windows = self.windows(overlap)
        if num_samples is None:
            num_samples = windows.span(count)
        if num_samples < 1 or windows.count(num_samples) != count:
            raise ValueError(
                f"{num_samples} samples do not take {count} windows ({windows.size} long, hop {windows.hop})"
            )
        out = torch.zeros(versions, batch, windows.span(count), dtype=self._dtype, device=codes.device)
        flat = codes.flatten(0, 1)
        with self._folded():
            for first in range(0, batch * count, WINDOWS_PER_BATCH):
                part = flat[first : first + WINDOWS_PER_BATCH]
                for version, wave in enumerate(waves(part)):
                    for place, window in enumerate(wave.squeeze(1), start=first):
                        windows.add(out[version, place // count], window, place % count)
                _advance(progress, len(part))
        return out[:, :, None, :num_samples]


def _advance(progress: Callable[[int], None] | None, windows: int) -> None:
    if progress is not None:
        progress(windows)
