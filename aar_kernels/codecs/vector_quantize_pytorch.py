"""`vector-quantize-pytorch`: ``ResidualVQ`` and one-dimensional ``HierarchicalVQ``.

``GroupedResidualVQ`` is a list of the first, each of which is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import quantization
from ..cache import DerivedCache
from ..quantization import Levels, residual_phi
from ..schedule import ScaleSchedule
from .adapter import Adapter, Unsupported, traced
from .plain import PlainResidual
from .search import Search, totals

_levels: DerivedCache[Levels] = DerivedCache()
_unit_length: DerivedCache[bool] = DerivedCache()
_distances_are_read: ContextVar[bool] = ContextVar("_distances_are_read", default=True)


class ResidualVQ(PlainResidual):
    """``forward(x[B, N, C])`` in eval mode without options -> quantized ``[B, N, C]``, indices ``[B, N, levels]``,
    losses (zeros); and ``get_output_from_indices``. All else, training among it, is the original's, with `Codebook`
    inside.

    With cosine similarity the package takes the largest product of the normalised residual and a code as it stands. It
    keeps its codes at length 1, and then that is the operators' cosine; codes of other lengths are the original's.
    """

    def _sources(self) -> list[Tensor]:
        layers = self.layers[:1] if self.shared_codebook else self.layers
        return [layer._codebook.embed for layer in layers]

    def _stack(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(sources))

    def _check(self) -> str:
        options = {
            "implicit neural codebooks": self.implicit_neural_codebook, "image maps": self.accept_image_fmap,
            "beam search": self.beam_size is not None, "DiVeQ": self.diveq,
            "affine parameters": any(layer._codebook.affine_param for layer in self.layers),
            "a bridge": any(layer._codebook.vq_bridge is not None for layer in self.layers),
        }  # fmt: skip
        if used := [name for name, value in options.items() if value]:
            raise Unsupported(f"it uses {', '.join(used)}")
        if self._metric() == "cosine" and self._is_filled() and not _are_unit(self._stack(self._sources())):
            raise Unsupported("it uses cosine similarity, and its codes are not of length 1")
        return super()._check()

    def _metric(self) -> str:
        return "cosine" if self.layers[0].use_cosine_sim else "euclidean"

    def _is_filled(self) -> bool:
        """Else the original fills the codebooks by k-means at the next call, be it in eval mode."""
        return all(layer._codebook.initted for layer in self.layers)

    def _levels(self, count: int, length: int) -> Levels | None:
        levels = super()._levels(count, length)
        if levels is not None and levels.metric == "cosine":
            books = levels.codebooks
            return levels if _unit_length.get([books], lambda: _are_unit(books)) else None
        return levels

    def forward(
        self, x, mask=None, indices=None, return_all_codes=False, sample_codebook_temp=None, freeze_codebook=False,
        beam_size=None, rand_quantize_dropout_fixed_seed=None,
    ):  # fmt: skip
        plain = mask is None and indices is None and beam_size is None and not return_all_codes and x.dim() == 3
        if plain and not self.training and self._is_filled():
            codes = self._encode(self.project_in(x).mT, self.num_quantizers)
            out = None if codes is None else self._decode(codes)
            if out is not None:
                losses = torch.zeros(self.num_quantizers, device=x.device)
                return self.project_out(out.mT), codes.permute(0, 2, 1).contiguous(), losses
        self._forget()
        return super().forward(
            x, mask, indices, return_all_codes, sample_codebook_temp, freeze_codebook, beam_size,
            rand_quantize_dropout_fixed_seed,
        )  # fmt: skip

    def get_output_from_indices(self, indices):
        known = indices.dim() == 3 and indices.shape[-1] == self.num_quantizers
        out = self._decode(indices.mT, least=-1) if known else None  # -1: a level that quantize dropout left out
        return super().get_output_from_indices(indices) if out is None else self.project_out(out.mT)


class HierarchicalVQ(Adapter):
    """``forward(x)`` in eval mode, with a mask or lengths or without, and ``get_output_from_indices``.

    Its phi is ``u + ratio (conv(u) - u)``, which is that of `aar_kernels.quantization.Levels` with another convolution.
    """

    def _check(self) -> str:
        if self.spatial_dims != 1:
            raise Unsupported(f"it has {self.spatial_dims} spatial dimensions")
        if len(set(self.codebook_sizes)) != 1:
            raise Unsupported(f"its codebooks differ in size: {sorted(set(self.codebook_sizes))}")
        lengths = " ".join(str(n) for (n,) in self.level_shapes)
        return f"{self.codebook_sizes[0]} codes of {self.dim} channels at {lengths} tokens, euclidean"

    def _books(self) -> list[nn.Module]:
        return [vq._codebook for vq in (self.vqs if self.vq is None else [self.vq])]

    @torch.compiler.disable
    def _forget(self) -> None:
        """As `PlainResidual._forget`."""
        _levels.forget([book.embed for book in self._books()])

    def _prepare(self) -> Levels | None:
        """The quantizer as data; None where a gradient is asked for, or it cannot be remembered."""
        books = self._books()
        modules = list(self.phi_levels or [self.phi_shared])
        ratio = modules[0].resi_ratio
        convolutions = [phi.conv for phi in modules] if ratio > 1e-8 else []
        sources = [book.embed for book in books]
        sources += [tensor for conv in convolutions for tensor in (conv.weight, conv.bias)]
        # The original fills codebooks by k-means in eval mode too, if they never were.
        if traced() or not all(book.initted for book in books) or any(source.is_inference() for source in sources):
            return None
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return None

        def build() -> Levels:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode, it would have no version
                last, kernels = max(self.num_levels - 1, 1), len(convolutions)
                index = [round(s / last * (kernels - 1)) for s in range(self.num_levels)] if kernels else []
                phis = [residual_phi(conv.weight, conv.bias, ratio) for conv in convolutions]
                weights, biases = [weight for weight, _ in phis], [bias for _, bias in phis]
                schedule = ScaleSchedule(n for (n,) in self.level_shapes)
                return Levels(schedule, torch.cat([book.embed for book in books]), weights, biases, index)

        return _levels.get(sources, build, ratio)

    @torch.compiler.disable
    def _quantize(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Reconstruction and codes of ``x[B, C, T]`` and ``mask[B, T]``; None where the original must run."""
        if x.dim() != 3 or 0 in x.shape or (levels := self._prepare()) is None or x.shape[1] != levels.latent_dim:
            return None
        if (backend := self._choose("msrq_encode", levels.codebooks, x)) is None:
            return None
        if mask is None:
            codes = quantization.encode(x, levels, backend=backend)
            if int(codes.amin()) < 0:  # a NaN or an Inf, for which the package has its own answer
                return None
            return quantization.decode(codes, levels, length=x.shape[2], backend=backend), codes
        if mask.dtype != torch.bool or mask.shape != (x.shape[0], x.shape[2]) or not x.isfinite().all():
            return None
        codes = quantization.encode(x, levels, mask=mask, backend=backend)
        out = quantization.decode(codes, levels, length=x.shape[2], backend=backend)
        return out.masked_fill(~mask[:, None], 0), codes

    def forward(self, x, indices=None, mask=None, lens=None, sample_codebook_temp=None, return_cutoff=False):
        plain = indices is None and (mask is None or lens is None) and not self.training
        rows = self.to_channel_first(x)
        frames = mask if lens is None else torch.arange(rows.shape[-1], device=lens.device) < lens[:, None]
        if not plain or (result := self._quantize(rows, frames)) is None:
            self._forget()
            return super().forward(x, indices, mask, lens, sample_codebook_temp, return_cutoff)
        reconstruction, codes = result
        parts = codes.split([n for (n,) in self.level_shapes], dim=1)
        cutoff = (None,) if return_cutoff else ()
        return self.to_channel_last(reconstruction), tuple(parts), torch.zeros((), device=x.device), *cutoff

    @torch.compiler.disable
    def _reconstruct(self, indices, full_shape) -> Tensor | None:
        length = self.level_shapes[-1][0] if full_shape is None else full_shape
        shapes = [tuple(part.shape[1:]) for part in indices] if isinstance(indices, tuple | list) else []
        if shapes != list(self.level_shapes) or not isinstance(length, int) or (levels := self._prepare()) is None:
            return None
        codes = torch.cat(list(indices), dim=1)
        if codes.numel() == 0 or not (-1 <= int(codes.amin()) and int(codes.amax()) < levels.codebook_size):
            return None
        if (backend := self._choose("msrq_decode", levels.codebooks)) is None:
            return None
        return quantization.decode(codes, levels, length=length, backend=backend)

    def get_output_from_indices(self, indices, full_shape=None):
        if (out := self._reconstruct(indices, full_shape)) is None:
            return super().get_output_from_indices(indices, full_shape)
        return self.to_channel_last(out)


class VectorQuantize(Search):
    """One level: it alone knows whether anyone reads the distances that its codebook returns."""

    def forward(
        self, x, indices=None, mask=None, lens=None, topk=None, sample_codebook_temp=None, freeze_codebook=None,
        return_loss_breakdown=False, codebook_transform_fn=None, ema_update_weight=None, accum_ema_update=False,
        ema_update=None,
    ):  # fmt: skip
        arguments = (
            x, indices, mask, lens, topk, sample_codebook_temp, freeze_codebook, return_loss_breakdown,
            codebook_transform_fn, ema_update_weight, accum_ema_update, ema_update,
        )  # fmt: skip
        reads = self.has_codebook_diversity_loss or self.commitment_use_cross_entropy_loss or indices is not None
        if traced() or reads:
            return super().forward(*arguments)
        token = _distances_are_read.set(False)
        try:
            return super().forward(*arguments)
        finally:
            _distances_are_read.reset(token)


class Codebook(Search):
    """``forward(x[..., D])`` -> rows, codes, and None for the distances; moving averages from sums of rows."""

    def forward(
        self, x, sample_codebook_temp=None, mask=None, freeze_codebook=False, codebook_transform_fn=None,
        ema_update_weight=None, accum_ema_update=False, ema_update=None, topk=None, update_usage=True,
    ):  # fmt: skip
        rows = x.float().reshape(-1, x.shape[-1])
        found = self._found(rows) if codebook_transform_fn is None and topk is None else None
        if found is None:
            return super().forward(
                x, sample_codebook_temp, mask, freeze_codebook, codebook_transform_fn, ema_update_weight,
                accum_ema_update, ema_update, topk, update_usage,
            )  # fmt: skip
        codes = found.view(x.shape[:-1])
        embed = self.embed if self.learnable_codebook else self.embed.detach()
        quantized = F.embedding(codes, embed[0].float())
        if self.training and update_usage and not freeze_codebook:
            if mask is not None:  # [B, N], of x[1, B * heads, N, D] where there are several
                mask = mask[:, None].expand(-1, rows.shape[0] // mask.numel(), -1).reshape(1, -1)
            self.update_codebook(rows[None], found, mask, ema_update_weight, accum_ema_update, ema_update)
        return quantized, codes, None

    def _found(self, rows: Tensor) -> Tensor | None:
        """The codes ``[1, N]`` of ``rows[N, D]``; None where the original must run, which also fills codebooks."""
        sampling = self.gumbel_sample.keywords
        random = self.training and (sampling["stochastic"] or sampling["straight_through"])
        other = random or self.affine_param or self.vq_bridge is not None or self.num_codebooks > 1
        if traced() or _distances_are_read.get() or other or not self.initted:
            return None
        if self.use_cosine_sim and not _are_unit(self.embed):
            return None
        return self._nearest(rows.mT[None], self.embed[0], "cosine" if self.use_cosine_sim else "euclidean")

    def track_cluster_size_and_embed_avg(
        self, flatten, embed_onehot, mask=None, ema_update_weight=None, accum_ema_update=False
    ):
        """Takes codes ``[1, N]`` too, where the original takes their one-hot rows."""
        if embed_onehot.is_floating_point():
            return super().track_cluster_size_and_embed_avg(
                flatten, embed_onehot, mask, ema_update_weight, accum_ema_update
            )
        rows, codes = (flatten[0], embed_onehot[0]) if mask is None else (flatten[mask], embed_onehot[mask])
        hits, sums = (part[None] for part in totals(rows.detach(), codes, self.codebook_size))
        self.all_reduce_fn(hits)
        self.all_reduce_fn(sums)
        if callable(ema_update_weight):
            ema_update_weight = ema_update_weight(sums, hits)
        for average, new in ((self.cluster_size, hits), (self.embed_avg, sums)):
            if accum_ema_update:
                self._package.accum_grad_(average, new)
            else:
                self._package.ema_inplace(average, new, self.decay, ema_update_weight)


def _are_unit(books: Tensor) -> bool:
    return bool(((books.square().sum(-1) - 1).abs() <= 1e-5).all())


ADAPTERS = {
    "vector_quantize_pytorch.residual_vq.ResidualVQ": ResidualVQ,
    "vector_quantize_pytorch.hierarchical_vq.HierarchicalVQ": HierarchicalVQ,
}
PARTS = {
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": VectorQuantize,
    "vector_quantize_pytorch.vector_quantize_pytorch.Codebook": Codebook,
}
