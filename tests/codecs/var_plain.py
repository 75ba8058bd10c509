"""Modules with the interface of FoundationVision/VAR's quantizer and attention, from the paper (arXiv 2404.02905).

Plain PyTorch, written for these tests: where there is no checkout of the repository, `aar_kernels.codecs.var` is tested
on these. They carry the names of the original classes, by which they are found.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Phi(nn.Conv2d):
    """phi(u) = (1 - r) u + r conv(u)."""

    def __init__(self, dim: int, ratio: float):
        super().__init__(dim, dim, 3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, u: Tensor) -> Tensor:
        return (1 - self.resi_ratio) * u + self.resi_ratio * super().forward(u)


class Phis(nn.Module):
    """Kernels at evenly spaced ticks; indexed by a scale's relative position, the nearest is taken."""

    def __init__(self, kernels: list[nn.Module]):
        super().__init__()
        self.kernels, count = nn.ModuleList(kernels), len(kernels)
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        self.ticks = np.linspace(margin, 1 - margin, count)

    def __getitem__(self, position: float) -> nn.Module:
        return self.kernels[int(np.argmin(np.abs(self.ticks - position)))]


class VectorQuantizer2(nn.Module):
    def __init__(
        self, vocab_size, Cvae, using_znorm, beta=0.25, default_qresi_counts=0, v_patch_nums=None, quant_resi=0.5,
        share_quant_resi=4,
    ):  # fmt: skip
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums, self.prog_si = v_patch_nums, -1
        count = share_quant_resi or default_qresi_counts or len(v_patch_nums)
        phi = (lambda: Phi(Cvae, quant_resi)) if abs(quant_resi) > 1e-6 else nn.Identity
        self.quant_resi = Phis([phi() for _ in range(count)])
        self.embedding = nn.Embedding(vocab_size, Cvae)

    @property
    def finest(self) -> tuple[int, int]:
        return (self.v_patch_nums[-1],) * 2

    def _phi(self, s: int, scales: int) -> nn.Module:
        return self.quant_resi[s / (scales - 1)]

    def _nearest(self, rows: Tensor) -> Tensor:
        book = self.embedding.weight.detach()
        if self.using_znorm:
            return (F.normalize(rows, dim=-1) @ F.normalize(book, dim=-1).T).argmax(1)
        return (rows.square().sum(1, keepdim=True) - 2 * rows @ book.T + book.square().sum(1)).argmin(1)

    def _up(self, h: Tensor, size: tuple[int, int]) -> Tensor:
        return h if h.shape[2:] == size else F.interpolate(h, size=size, mode="bicubic")

    def _scales(self, x: Tensor, patches):
        """Per scale: the codes ``[B, h * w]`` and the reconstruction up to it."""
        patches = [(p, p) if isinstance(p, int) else tuple(p) for p in patches]
        assert patches[-1] == x.shape[2:], f"{patches[-1]} is not {tuple(x.shape[2:])}"
        rest, f_hat = x.detach().clone(), torch.zeros_like(x)
        for s, (h, w) in enumerate(patches):
            rows = F.interpolate(rest, size=(h, w), mode="area").permute(0, 2, 3, 1)
            codes = self._nearest(rows.flatten(0, 2)).view(len(x), h * w)
            image = self.embedding(codes).mT.unflatten(2, (h, w))
            update = self._phi(s, len(patches))(self._up(image, x.shape[2:]))
            rest, f_hat = rest - update, f_hat + update
            yield codes, f_hat

    def forward(self, f_BChw, ret_usages=False):
        x, loss = f_BChw.float(), 0.0
        scales = len(self.v_patch_nums)
        for _, f_hat in self._scales(x, self.v_patch_nums):
            loss += (self.beta * F.mse_loss(f_hat.detach(), x) + F.mse_loss(f_hat, x.detach())) / scales
        usages = [0.0] * scales if ret_usages else None
        return (f_hat.detach() - x.detach()) + x, usages, loss

    def embed_to_fhat(self, ms_h_BChw, all_to_max_scale=True, last_one=False):
        results, f_hat = [], 0.0
        for s, h in enumerate(ms_h_BChw):
            f_hat = f_hat + self._phi(s, len(self.v_patch_nums))(self._up(h, self.finest))
            results.append(f_hat)
        return results[-1] if last_one else results

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        return [f_hat if to_fhat else codes for codes, f_hat in self._scales(f_BChw, v_patch_nums or self.v_patch_nums)]

    def idxBl_to_var_input(self, gt_ms_idx_Bl):
        f_hat, inputs, sides = 0.0, [], self.v_patch_nums
        for s, (codes, n, following) in enumerate(zip(gt_ms_idx_Bl, sides, sides[1:], strict=False)):
            h = self.embedding(codes).mT.unflatten(2, (n, n))
            f_hat = f_hat + self._phi(s, len(sides))(self._up(h, self.finest))
            inputs.append(F.interpolate(f_hat, size=(following, following), mode="area").flatten(2).mT)
        return torch.cat(inputs, dim=1) if inputs else None

    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        f_hat.add_(self._phi(si, SN)(self._up(h_BChw, self.finest)))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(self.v_patch_nums[si + 1],) * 2, mode="area")


class SelfAttention(nn.Module):
    def __init__(
        self, block_idx, embed_dim=768, num_heads=12, attn_drop=0.0, proj_drop=0.0, attn_l2_norm=False,
        flash_if_available=True,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = num_heads, embed_dim // num_heads, attn_l2_norm
        self.scale = 1 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.mat_qkv, self.proj = nn.Linear(embed_dim, 3 * embed_dim, bias=False), nn.Linear(embed_dim, embed_dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(embed_dim)), nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0 else nn.Identity()
        self.attn_drop, self.using_flash, self.using_xform = attn_drop, False, False
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x, attn_bias):
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100.0)).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], dim=2), torch.cat([self.cached_v, v], dim=2)
            self.cached_k, self.cached_v = k, v
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


VectorQuantizer2.__module__, SelfAttention.__module__ = "models.quant", "models.basic_var"
