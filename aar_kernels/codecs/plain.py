"""Plain residual quantizers: each level subtracts the nearest row of its codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import quantization
from ..cache import DerivedCache
from ..quantization import Levels
from ..schedule import ScaleSchedule
from .adapter import Adapter, Unsupported, traced

_codebooks: DerivedCache[Tensor] = DerivedCache()


class PlainResidual(Adapter):
    """``_encode`` and ``_decode`` on the codebooks that ``_sources`` and ``_stack`` find in the module."""

    def _sources(self) -> list[Tensor]:
        """The tensors that the codebooks are made of, codebooks first; when one of them changes, so do these."""
        raise NotImplementedError

    def _stack(self, sources: Sequence[Tensor]) -> Tensor:
        """``[levels, K, D]``, or ``[1, K, D]`` for one codebook that all levels share."""
        return torch.stack(list(sources))

    def _metric(self) -> str:
        return "euclidean"

    def _check(self) -> str:
        sources = self._sources()
        sizes = {tuple(tensor.shape) for tensor in sources if tensor.dim() == sources[0].dim()}
        if len(sizes) != 1:
            raise Unsupported(f"its codebooks differ in size: {sorted(sizes)}")
        with torch.no_grad():
            books, size, dim = self._stack([tensor.to("meta") for tensor in sources]).shape
        return f"{books} x {size} codes of {dim} channels, {self._metric()}"

    def _levels(self, count: int, length: int) -> Levels | None:
        """The first ``count`` levels as data, for sequences of ``length``; None if they cannot be remembered."""
        sources = self._sources()
        if traced() or any(source.is_inference() for source in sources):
            return None

        def build() -> Tensor:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode, it would have no version
                return self._stack(sources).contiguous()

        books = _codebooks.get(sources, build, type(self))
        return Levels(ScaleSchedule((length,) * count), books, metric=self._metric())

    @torch.compiler.disable
    def _forget(self) -> None:
        """Before the original trains or fills codebooks: it writes them where no version counter sees it."""
        _codebooks.forget(self._sources())

    @torch.compiler.disable
    def _encode(self, x: Tensor, count: int) -> Tensor | None:
        """``x[B, D, T]`` -> codes ``[B, count, T]``; None where the original must run."""
        if x.dim() != 3 or 0 in x.shape or count < 1:
            return None
        levels = self._levels(count, x.shape[-1])
        if levels is None or (backend := self._choose("msrq_encode", levels.codebooks, x)) is None:
            return None
        codes = quantization.encode(x, levels, backend=backend)
        if int(codes.amin()) < 0:  # a NaN or an Inf, for which each package has its own answer
            return None
        return codes.unflatten(1, (count, x.shape[-1]))

    @torch.compiler.disable
    def _decode(self, codes: Tensor, least: int = 0) -> Tensor | None:
        """Codes ``[B, levels, T]`` -> ``[B, D, T]``; None where the original must run, as for codes below ``least``."""
        if codes.dim() != 3 or 0 in codes.shape or codes.dtype not in (torch.int64, torch.int32):
            return None
        if torch.is_grad_enabled() and any(source.requires_grad for source in self._sources()):
            return None
        levels = self._levels(codes.shape[1], codes.shape[2])
        if levels is None or (backend := self._choose("msrq_decode", levels.codebooks)) is None:
            return None
        low, high = codes.aminmax()
        if low < least or high >= levels.codebook_size or codes.device != levels.codebooks.device:
            return None
        return quantization.decode(codes.flatten(1).long(), levels, backend=backend)


class AveragedResidual(PlainResidual):
    """The same, of packages that keep codebooks as averages: ``sums / clamp(hits)``.

    They compute a codebook once and keep it, whatever happens to the averages afterwards; this follows them.
    """

    def _averages(self) -> tuple[list[Tensor], list[Tensor], float]:
        """Each level's sums ``[K, D]`` and hits ``[K]``, and the least number of hits to divide by."""
        raise NotImplementedError

    def _sources(self) -> list[Tensor]:
        sums, hits, _ = self._averages()
        return sums + hits

    def _stack(self, sources: Sequence[Tensor]) -> Tensor:
        count, (*_, least) = len(sources) // 2, self._averages()
        return torch.stack(list(sources[:count])) / torch.stack(list(sources[count:])).clamp(min=least)[..., None]
