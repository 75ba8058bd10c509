"""FoundationVision/VAR: the multi-scale quantizer of images, and the attention of its transformer.

Its modules live in a package called ``models``, as many others do, and have been changed in many copies of it; so both
are held to a probe before they are replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import quantization
from ..attention import ScaleCache, scale_attention, scale_attention_step
from ..cache import DerivedCache
from ..precision import without_tf32
from ..quantization import Levels, residual_phi
from ..schedule import GridSchedule, ScaleSchedule
from .adapter import Adapter, Unsupported, traced

_levels: DerivedCache[Levels] = DerivedCache()
_schedules: DerivedCache[ScaleSchedule | None] = DerivedCache()
_caches: weakref.WeakKeyDictionary[nn.Module, ScaleCache] = weakref.WeakKeyDictionary()


def _held_to(probe: nn.Module) -> None:
    """Raises `Unsupported` for weights that cannot be probed."""
    for weight in probe.parameters():
        if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "cuda"):
            raise Unsupported(f"its weights are {weight.dtype} on {weight.device}; known are float32 on CPU and CUDA")


class VarQuantizer(Adapter):
    """From images to codes and back: ``f_to_idxBl_or_fhat``, ``idxBl_to_var_input``, and ``forward`` in eval mode; and
    what is given rows, of which none need be a code: ``embed_to_fhat`` and ``get_next_autoregressive_input``."""

    @torch.no_grad()
    @without_tf32()
    def _check(self) -> str:
        _held_to(self)
        convolutions = self._convolutions()
        for conv in convolutions:
            side = conv.kernel_size[0]
            plain = (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1) and conv.bias is not None
            square = conv.kernel_size == (side, side) and side % 2 == 1 and conv.padding == (side // 2, side // 2)
            if not plain or not square or conv.padding_mode != "zeros" or not hasattr(conv, "resi_ratio"):
                raise Unsupported(f"a phi is not a square convolution with a residual ratio: {conv}")
        if self.prog_si >= 0:
            raise Unsupported(f"it is in progressive training (prog_si = {self.prog_si})")
        levels = self._prepare(self.v_patch_nums, False)
        if levels is None:
            raise Unsupported(f"its scales are {self.v_patch_nums}, or its weights cannot be remembered")
        self._probe(levels)
        grids = " ".join(f"{height}x{width}" for height, width in levels.schedule.grids)
        return f"{levels.codebook_size} codes of {levels.latent_dim} channels at {grids} tokens, {levels.metric}"

    def _probe(self, levels: Levels) -> None:
        """Compares both on noise, since attributes do not tell all that these methods do."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, levels.latent_dim, *levels.schedule.grid, generator=generator).to(levels.codebooks.device)
        x *= levels.codebooks.std(correction=0)
        original = self._aar_original
        theirs = torch.cat(original.f_to_idxBl_or_fhat(self, x, False), dim=1)
        alike = (quantization.encode(x, levels, backend="reference") == theirs).float().mean()
        values = [(quantization.decode(theirs, levels, backend="reference"),
                   original.f_to_idxBl_or_fhat(self, x, True)[-1])]  # fmt: skip
        if levels.schedule.num_scales > 1:
            parts = list(theirs.split(list(levels.schedule.lengths), dim=1))
            inputs = quantization.next_scale_inputs(theirs, levels, backend="reference")
            values.append((inputs, original.idxBl_to_var_input(self, parts)))
        for ours, expected in values:
            if ours.shape != expected.shape or not (ours - expected).norm() <= 1e-3 * expected.norm():
                raise Unsupported("on a probe its images are not what its codes and weights give")
        if alike < 0.9:
            raise Unsupported("on a probe its codes are not the nearest ones")

    def _convolutions(self) -> list[nn.Conv2d]:
        return [module for module in self.quant_resi.modules() if isinstance(module, nn.Conv2d)]

    def _prepare(self, patches: Sequence[int | tuple[int, int]], grad: bool) -> Levels | None:
        """The quantizer as data; None where the original must run: with ``grad``, where a gradient is asked for."""
        convolutions = self._convolutions()
        sources = [self.embedding.weight, *(part for conv in convolutions for part in (conv.weight, conv.bias))]
        if grad and torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return None
        patches = tuple(patch if isinstance(patch, int) else tuple(patch) for patch in patches)
        # A single scale has no relative position, by which the original would choose its phi.
        if traced() or self.prog_si >= 0 or len(patches) < 2 or any(source.is_inference() for source in sources):
            return None
        ratios = tuple(conv.resi_ratio for conv in convolutions)

        def build() -> Levels:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode, it would have no version
                phis = [residual_phi(conv.weight, conv.bias, conv.resi_ratio) for conv in convolutions]
                last, kernels = len(patches) - 1, [id(conv) for conv in convolutions]
                index = [kernels.index(id(self.quant_resi[s / last])) for s in range(last + 1)] if kernels else []
                weights, biases = [weight for weight, _ in phis], [bias for _, bias in phis]
                metric = "cosine" if self.using_znorm else "euclidean"
                return Levels(GridSchedule(patches), sources[0].detach()[None], weights, biases, index, metric)

        return _levels.get(sources, build, patches, ratios, bool(self.using_znorm))

    @torch.compiler.disable
    def _encode(self, x: Tensor, patches: Sequence, grad: bool) -> tuple[Levels, str, Tensor] | None:
        """Levels, backend and codes of ``x[B, C, H, W]``; None where the original must run."""
        if x.dim() != 4 or 0 in x.shape or (levels := self._prepare(patches, grad)) is None:
            return None
        if x.shape[1:] != (levels.latent_dim, *levels.schedule.grid):
            return None
        if (backend := self._choose("msrq_encode", levels.codebooks, x)) is None:
            return None
        codes = quantization.encode(x.detach(), levels, backend=backend)
        # A NaN or an Inf has no code; the original has an answer of its own.
        return None if int(codes.amin()) < 0 else (levels, backend, codes)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        if (encoded := self._encode(f_BChw, v_patch_nums or self.v_patch_nums, to_fhat)) is None:
            return super().f_to_idxBl_or_fhat(f_BChw, to_fhat, v_patch_nums)
        levels, backend, codes = encoded
        if to_fhat:
            return list(quantization.decode_scales(codes, levels, backend=backend).contiguous())
        return [part.contiguous() for part in codes.split(list(levels.schedule.lengths), dim=1)]

    @torch.compiler.disable
    def _inputs(self, parts: Sequence[Tensor]) -> Tensor | None:
        if (levels := self._prepare(self.v_patch_nums, True)) is None:
            return None
        if [tuple(part.shape[1:]) for part in parts] != [(n,) for n in levels.schedule.lengths]:
            return None
        codes = torch.cat(list(parts), dim=1)
        known = codes.dtype == torch.int64 and codes.numel() > 0 and codes.device == levels.codebooks.device
        if not known or not 0 <= int(codes.amin()) <= int(codes.amax()) < levels.codebook_size:
            return None
        if (backend := self._choose("msrq_next_scale_inputs", levels.codebooks)) is None:
            return None
        return quantization.next_scale_inputs(codes, levels, backend=backend)

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        inputs = self._inputs(gt_ms_idx_Bl)
        return super().idxBl_to_var_input(gt_ms_idx_Bl) if inputs is None else inputs

    @torch.compiler.disable
    def _given_rows(self, operator: str, images: Sequence[Tensor], *others: Tensor) -> tuple[Levels, str] | None:
        """Levels and backend for images of rows, one of each scale; None where the original must run."""
        levels, tensors = self._prepare(self.v_patch_nums, True), (*images, *others)
        if levels is None or any(tensor.dim() != 4 or 0 in tensor.shape for tensor in tensors):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None
        backend = self._choose(operator, levels.codebooks, *tensors)
        return None if backend is None else (levels, backend)

    def embed_to_fhat(self, ms_h_BChw, all_to_max_scale=True, last_one=False):
        given = self._given_rows("msrq_decode_scales", ms_h_BChw) if all_to_max_scale else None
        if given is None or [tuple(h.shape[2:]) for h in ms_h_BChw] != list(given[0].schedule.grids):
            return super().embed_to_fhat(ms_h_BChw, all_to_max_scale, last_one)
        levels, backend = given
        rows = torch.cat([h.flatten(2) for h in ms_h_BChw], dim=2).mT
        if last_one:
            return quantization.decode(rows, levels, backend=backend).contiguous()
        return list(quantization.decode_scales(rows, levels, backend=backend).contiguous())

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        given = self._given_rows("msrq_step", [h_BChw], f_hat)
        grids = () if given is None else given[0].schedule.grids
        if len(grids) != SN or f_hat.shape[2:] != grids[-1] or h_BChw.shape[2:] != grids[si]:
            return super().get_next_autoregressive_input(si, SN, f_hat, h_BChw)
        (levels, backend), rows = given, h_BChw.flatten(2).mT
        after, following = quantization.step(si, f_hat.flatten(2).mT, rows, levels, backend=backend)
        f_hat.copy_(after.mT.unflatten(2, grids[-1]))  # in place, as the original
        return f_hat, following.mT.unflatten(2, grids[si + 1]).contiguous() if si + 1 < SN else f_hat

    def forward(self, f_BChw, ret_usages=False):
        x = f_BChw.float()
        wanted = self.training or ret_usages or (torch.is_grad_enabled() and x.requires_grad)
        if wanted or (encoded := self._encode(x, self.v_patch_nums, True)) is None:
            return super().forward(f_BChw, ret_usages)
        levels, backend, codes = encoded
        scales = quantization.decode_scales(codes, levels, backend=backend)
        loss = (1 + self.beta) * (scales - x).square().mean()  # commitment and codebook losses have one value
        return (scales[-1] - x).add_(x), None, loss


class VarAttention(Adapter):
    """``forward(x[B, L, C], attn_bias)``: masked, or one scale at a time with ``kv_caching``.

    A cached step writes its keys and values behind the others instead of copying all; ``cached_k`` and ``cached_v`` are
    views of them, in the original's layout.
    """

    @torch.no_grad()
    @without_tf32()
    def _check(self) -> str:
        _held_to(self)
        if self.using_flash or self.using_xform:
            raise Unsupported("it runs on flash-attn or xformers")
        width, device = self.num_heads * self.head_dim, self.mat_qkv.weight.device
        x = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(0)).to(device)
        bias = torch.zeros(1, 1, 6, 6, device=device).masked_fill(~ScaleSchedule((1, 2, 3)).mask(device), -torch.inf)
        caching, self.caching = self.caching, False
        dropout, self.attn_drop = self.attn_drop, 0.0
        proj_drop, self.proj_drop = self.proj_drop, nn.Identity()
        try:
            for mask in (bias, None):
                ours, expected = self._attend(x, mask, "reference"), self._aar_original.forward(self, x, mask)
                if not torch.allclose(ours, expected, rtol=1e-3, atol=1e-4):
                    raise Unsupported("on a probe its output is not what its weights give")
        finally:
            self.caching, self.attn_drop, self.proj_drop = caching, dropout, proj_drop
        kind = "cosine, " if self.attn_l2_norm else ""
        return f"attention, {kind}{self.num_heads} heads of {self.head_dim}"

    def kv_caching(self, enable):
        _caches.pop(self, None)
        super().kv_caching(enable)

    def forward(self, x, attn_bias):
        out = self._run(x, attn_bias)
        return super().forward(x, attn_bias) if out is None else out

    @torch.compiler.disable
    def _run(self, x: Tensor, attn_bias: Tensor | None) -> Tensor | None:
        dropped = self.training and self.attn_drop > 0
        if traced() or dropped or x.dim() != 3 or 0 in x.shape or (self.caching and attn_bias is not None):
            return None
        if self.caching and torch.is_grad_enabled() and any(p.requires_grad for p in (x, *self.parameters())):
            return None
        operator = "attention_step" if self.caching else "attention_forward"
        if (backend := self._choose(operator, x, self.mat_qkv.weight, dim=self.head_dim)) is None:
            return None
        return self._attend(x, attn_bias, backend)

    def _attend(self, x: Tensor, attn_bias: Tensor | None, backend: str) -> Tensor | None:
        """None where the mask is not that of scales."""
        batch, length, width = x.shape
        schedule = ScaleSchedule((length,)) if attn_bias is None else _schedule_of(attn_bias, length)
        if schedule is None:
            return None
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(batch, length, 3, self.num_heads, self.head_dim)
        options = {"softmax_scale": float(self.scale), "backend": backend}
        if self.attn_l2_norm:
            options["head_log_scale"] = self.scale_mul_1H11.flatten()
        if self.caching:
            out = scale_attention_step(*qkv.unbind(2), self._room(batch, length), **options)
            cache = _caches[self]
            self.cached_k, self.cached_v = (held[:, : cache.length].transpose(1, 2) for held in (cache.k, cache.v))
        else:
            out = scale_attention(*qkv.unbind(2), schedule, **options)
        return self.proj_drop(self.proj(out.flatten(2)))

    def _room(self, batch: int, more: int) -> ScaleCache:
        """A cache that holds what ``cached_k`` and ``cached_v`` do, with room for ``more`` tokens."""
        cache, held = _caches.get(self), 0 if self.cached_k is None else self.cached_k.shape[2]
        # Whoever cleared or exchanged them meant it; else they are views of the cache.
        ours = cache is not None and held > 0 and self.cached_k.data_ptr() == cache.k.data_ptr()
        if ours and cache.length == held and held + more <= cache.k.shape[1]:
            return cache
        room, device = max(2 * held, held + more, 64), self.mat_qkv.weight.device
        grown = ScaleCache.empty(batch, room, self.num_heads, self.head_dim, device=device)
        if held > 0:
            grown.k[:, :held], grown.v[:, :held] = self.cached_k.transpose(1, 2), self.cached_v.transpose(1, 2)
        grown.length, _caches[self] = held, grown
        return grown


def _schedule_of(attn_bias: Tensor, length: int) -> ScaleSchedule | None:
    """The scales of a mask ``[1, 1, length, length]`` of zeros and -inf; None for any other mask."""
    if attn_bias.shape != (1, 1, length, length) or attn_bias.requires_grad:
        return None

    def find() -> ScaleSchedule | None:
        seen = (attn_bias[0, 0] == 0).sum(dim=1).tolist()
        ends = sorted(set(seen))
        if ends[0] < 1 or ends[-1] != length:
            return None
        schedule = ScaleSchedule(end - start for start, end in pairwise([0, *ends]))
        expected = torch.zeros_like(attn_bias).masked_fill_(~schedule.mask(attn_bias.device), -torch.inf)
        return schedule if torch.equal(expected, attn_bias) else None

    return _schedules.get([attn_bias], find, length)


ADAPTERS = {"models.quant.VectorQuantizer2": VarQuantizer, "models.basic_var.SelfAttention": VarAttention}
