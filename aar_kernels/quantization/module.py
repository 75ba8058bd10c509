"""`MultiScaleResidualQuantizer`: projections, trainable phi, and codebooks kept as moving averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..schedule import GridSchedule, ScaleSchedule
from . import api
from .kmeans import kmeans, nearest
from .levels import Levels, phi_sharing_index
from .reference import area_down, contribution


class Phi(nn.Module):
    """Weights of one phi(u) = (u + conv1d(u)) / 2: ``weight[D, D, k]``, ``bias[D]``."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        conv = nn.Conv1d(dim, dim, kernel_size)
        self.weight, self.bias = conv.weight, conv.bias


class MultiScaleResidualQuantizer(nn.Module):
    """Multi-scale residual quantization (arXiv 2408.09027, section 3.1) with exponential-moving-average codebooks.

    ``MultiScaleResidualQuantizer(dim, schedule=ScaleSchedule.quadratic(16, 75), latent_dim=64)`` is the published
    quantizer; ``schedule=ScaleSchedule((T,) * n), phi_kernel_sizes=()`` is plain residual quantization.

    Args:
        dim: channels of the sequences ``[B, dim, T]`` outside.
        schedule: tokens per scale.
        codebook_size: codes per codebook.
        latent_dim: channels inside; a linear projection leads there and back where it differs from ``dim``.
        phi_kernel_sizes: odd width of each distinct phi kernel. ``()``: no phi.
        phi_sharing: ``"partial"`` gives each scale the kernel nearest to its relative position (`phi_sharing_index`),
            ``"none"`` one kernel per scale, ``"full"`` one for all. A single size stands for as many as are needed.
        shared_codebook: one codebook for all scales.
        metric: ``"euclidean"`` or ``"cosine"``.
        straight_through: ``"per_scale"`` (published) or ``"once"``; see `aar_kernels.quantization.quantize`.
        decay: of the moving averages of code hits and row sums.
        epsilon: Laplace smoothing of the hits.
        kmeans_init: fill the codebooks by k-means on the first training batch; else they start from random rows.
        kmeans_iterations: of that k-means.
        dead_code_threshold: in training, a code whose average hits fall below it is replaced by a random row of the
            batch; 0 turns that off.
        frozen: codebooks that never learn: no moving averages are kept, and the training pass is refused. For a model
            that reads the codes of another one's quantizer.
    """

    def __init__(
        self, dim: int, *, schedule: ScaleSchedule, codebook_size: int = 1024, latent_dim: int | None = None,
        phi_kernel_sizes: Sequence[int] = (9,) * 6, phi_sharing: str = "partial", shared_codebook: bool = False,
        metric: str = "euclidean", straight_through: str = "per_scale", decay: float = 0.99, epsilon: float = 1e-5,
        kmeans_init: bool = True, kmeans_iterations: int = 50, dead_code_threshold: float = 2.0,
        frozen: bool = False,
    ):  # fmt: skip
        super().__init__()
        if isinstance(schedule, GridSchedule):
            raise ValueError("this module is for sequences; for grids use Levels and the functions on it")
        latent_dim = latent_dim or dim
        self.dim, self.latent_dim, self.schedule, self.metric = dim, latent_dim, schedule, metric
        self.straight_through, self.decay, self.epsilon = straight_through, decay, epsilon
        self.kmeans_iterations, self.dead_code_threshold = kmeans_iterations, dead_code_threshold

        projected = latent_dim != dim
        self.project_in = nn.Linear(dim, latent_dim) if projected else nn.Identity()
        self.project_out = nn.Linear(latent_dim, dim) if projected else nn.Identity()
        sizes, self.phi_index = _phi_layout(tuple(phi_kernel_sizes), phi_sharing, schedule.num_scales)
        self.phi = nn.ModuleList(Phi(latent_dim, size) for size in sizes)

        books = 1 if shared_codebook else schedule.num_scales
        self.register_buffer("codebooks", torch.randn(books, codebook_size, latent_dim) / latent_dim**0.5)
        self.frozen = frozen
        if not frozen:
            self.register_buffer("embed_avg", self.codebooks.clone())
            self.register_buffer("cluster_size", torch.ones(books, codebook_size))
        # Not made at each call: copying it to the device would wait for the device.
        self.register_buffer("_book_lengths", torch.tensor(schedule.lengths[:books]), persistent=False)
        kmeans_init = kmeans_init and not frozen
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        # The buffer travels with the state_dict; the flag spares every call a device-to-host read of it.
        self._initialized = not kmeans_init
        self._levels: Levels | None = None
        self._pending: list[Tensor] | None = None
        self.levels.arguments()  # checks the options that the caller gave

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._initialized = bool(self.initialized)

    @property
    def levels(self) -> Levels:
        """The quantizer as data, for the functions of `aar_kernels.quantization`."""
        codebooks = self._buffers["codebooks"]
        weights = [phi._parameters["weight"] for phi in self._modules["phi"]]
        biases = [phi._parameters["bias"] for phi in self._modules["phi"]]
        # Made anew only where a tensor was replaced by another object: this is on the path of every call.
        kept = self._levels
        if kept is None or any(a is not b for a, b in zip(kept.weights, (codebooks, *weights, *biases), strict=True)):
            kept = self._levels = Levels(self.schedule, codebooks, weights, biases, self.phi_index, self.metric)
        return kept

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    @torch.no_grad()
    def encode(self, x: Tensor, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Codes ``[B, total]`` int64 of ``x[B, dim, T]``. ``mask[B, T]`` bool marks real frames. Needs no gradient."""
        return api.encode(self._project_in(x), self.levels, mask=mask, backend=backend)

    def decode(self, codes: Tensor, *, length: int | None = None, backend: str | None = None) -> Tensor:
        """``[B, dim, length]`` from codes ``[B, total]``; ``length`` is the schedule's unless given."""
        return self._project_out(api.decode(codes, self.levels, length=length, backend=backend))

    def decode_scales(self, codes: Tensor, *, length: int | None = None, backend: str | None = None) -> Tensor:
        """The reconstruction after each scale, ``[S, B, dim, length]``."""
        return self._project_out(api.decode_scales(codes, self.levels, length=length, backend=backend))

    def next_scale_inputs(self, codes: Tensor, *, length: int | None = None, backend: str | None = None) -> Tensor:
        """Teacher-forcing inputs ``[B, total - lengths[0], latent]`` of a next-scale model."""
        return api.next_scale_inputs(codes, self.levels, length=length, backend=backend)

    def step(self, scale: int, f_hat: Tensor, codes: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """Add one scale's codes to ``f_hat[B, T, latent]``; returns it and the next scale's input (see `api.step`)."""
        return api.step(scale, f_hat, codes, self.levels, backend=backend)

    def latent_to_sequence(self, f_hat: Tensor) -> Tensor:
        """``f_hat[B, T, latent]``, as `step` accumulates it, to ``[B, dim, T]``."""
        return self._project_out(f_hat.mT)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, backend: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized ``[B, dim, T]``, codes ``[B, total]``, commitment loss (scalar) of ``x[B, dim, T]``.

        In training mode the codebooks are updated from the batch (all-reduced over ``torch.distributed``).

        Raises:
            RuntimeError: training mode, and frozen codebooks.
        """
        training = self.training
        if training and self.frozen:
            raise RuntimeError("frozen codebooks do not learn: use eval(), encode and decode")
        x = self._project_in(x)
        if training and not self._initialized:
            self._initialize(x.detach(), mask)
        samples = self._draw_samples(x) if training and self.dead_code_threshold > 0 else None
        quantized, codes, loss, statistics = api.quantize(
            x, self.levels, mask=mask, straight_through=self.straight_through,
            statistics=training, samples=samples, backend=backend,
        )  # fmt: skip
        if training and self._pending is not None:
            self._pending.append(statistics)
        elif training:
            self._update([statistics], backend)
        return self._project_out(quantized), codes, loss

    def initialize(self, x: Tensor, *, mask: Tensor | None = None) -> None:
        """Fills the codebooks by k-means on ``x[B, dim, T]`` (of all processes together), unless they are filled.

        The first training pass does it by itself; this is for a first batch that comes in parts.
        """
        if not self._initialized:
            self._initialize(self._project_in(x).detach(), mask)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Training passes inside the block update the codebooks once, at its end, as one pass over all their items.

        If the block raises, the codebooks stay as they are.
        """
        self._pending = []
        try:
            yield
            if self._pending:
                self._update(self._pending)
        finally:
            self._pending = None

    def _project_in(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [batch, {self.dim}, T], got {list(x.shape)}")
        return x if self.dim == self.latent_dim else self.project_in(x.mT).mT

    def _project_out(self, x: Tensor) -> Tensor:
        return x if self.dim == self.latent_dim else self.project_out(x.mT).mT

    def _draw_samples(self, x: Tensor) -> Tensor:
        """For each code a random row of its scale, as an index into this process's batch."""
        rows = self._book_lengths * x.shape[0]
        return (torch.rand(self.codebooks.shape[:2], device=x.device) * rows[:, None]).long()

    @torch.no_grad()
    def _update(self, batches: list[Tensor], backend: str | None = None) -> None:
        parts, first = len(batches) * _world(), len(batches) * _rank()
        if parts > 1 and self.dead_code_threshold > 0:
            # Each batch offers rows for its share of the codes, so that the sum over batches picks one row.
            owner = torch.arange(self.codebook_size, device=batches[0].device) % parts
            for i, statistics in enumerate(batches, start=first):
                sampled = statistics[-self.codebooks.numel() :].view_as(self.codebooks)
                sampled.mul_((owner == i)[:, None])
        statistics = sum(batches[1:], start=batches[0])
        if _world() > 1:
            dist.all_reduce(statistics)
        api.update(
            self.codebooks, self.cluster_size, self.embed_avg, statistics, decay=self.decay, epsilon=self.epsilon,
            dead_code_threshold=self.dead_code_threshold, backend=backend,
        )  # fmt: skip

    @torch.no_grad()
    def _initialize(self, x: Tensor, mask: Tensor | None) -> None:
        """k-means, scale by scale, on what the scales before leave of the first batch (of all processes together)."""
        rows = x.mT.to(self.codebooks.dtype)
        mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        rows = rows.masked_fill(~mask[..., None], 0)
        mask = mask & rows.isfinite().flatten(1).all(dim=1)[:, None]  # an item that has a NaN in it counts as padding
        rows, mask = _gather(rows.masked_fill(~mask[..., None], 0)), _gather(mask)
        if not mask.any():
            return  # nothing to begin with: the next batch is the first
        residual, arguments = rows, self.levels.arguments()
        pooled = []
        for s, n in enumerate(self.schedule.lengths):
            valid = area_down(mask[..., None].to(rows.dtype), n)[..., 0] > 0
            down = area_down(residual, n, mask)
            pooled.append(down[valid])
            if len(self.codebooks) > 1:
                book, hits = kmeans(down[valid], self.codebook_size, self.kmeans_iterations, self.metric, seed=s)
                self.codebooks[s], self.cluster_size[s] = book, hits
                codes = nearest(down.flatten(0, 1), book, self.metric).view(down.shape[:2])
                residual = residual - contribution(codes, s, x.shape[2], *arguments[:3], self.phi_index)
                residual = residual * mask[..., None]
        if len(self.codebooks) == 1:
            book, hits = kmeans(torch.cat(pooled), self.codebook_size, self.kmeans_iterations, self.metric)
            self.codebooks[0], self.cluster_size[0] = book, hits
        self.embed_avg.copy_(self.codebooks * self.cluster_size[..., None])
        self.initialized.fill_(True)
        self._initialized = True

    def extra_repr(self) -> str:
        return f"dim={self.dim}, latent_dim={self.latent_dim}, lengths={self.schedule.lengths}, metric={self.metric}"


def _phi_layout(sizes: tuple[int, ...], sharing: str, scales: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths of the distinct kernels, and which one each scale uses."""
    if not sizes:
        return (), ()
    if sharing == "partial":
        return sizes, phi_sharing_index(len(sizes), scales)
    wanted = {"none": scales, "full": 1}.get(sharing)
    if wanted is None:
        raise ValueError(f'phi_sharing must be "none", "partial" or "full", got {sharing!r}')
    if len(set(sizes)) == 1:
        sizes = sizes[:1] * wanted
    if len(sizes) != wanted:
        raise ValueError(f"phi_sharing={sharing!r} needs {wanted} kernel sizes (or equal ones), got {sizes}")
    return sizes, tuple(range(scales)) if sharing == "none" else (0,) * scales


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0


def _gather(x: Tensor) -> Tensor:
    """The batches of all processes, in rank order; they must be of one shape."""
    if _world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(_world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
