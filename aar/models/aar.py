"""AAR, the acoustic autoregressive transformer: it predicts all codes of a scale from the scales before.

Source: arXiv 2408.09027, section 3.2. The block is that of VAR (arXiv 2404.02905), with the adaptive layer norm of DiT
(arXiv 2212.09748).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import aar_kernels as ak
from aar_kernels.modulation import gated_residual_modulate, layer_norm_modulate

from .pretrained import Pretrained, config_from_dict

__all__ = ["AAR", "AARConfig"]


@dataclass(frozen=True)
class AARConfig:
    """Sizes of an AAR. The defaults are the published depth 16: 308 M parameters.

    Attributes:
        depth: transformer blocks.
        width: channels of a token; heads of `width // heads` channels each.
        heads: attention heads.
        mlp_ratio: hidden channels of a feed-forward layer, as a multiple of `width`.
        condition_dim: channels of the condition, such as 512 of a CLAP embedding.
        cosine_attention: normalised queries and keys with a learned scale per head; else logits / (4 sqrt(head_dim)).
        norm_eps: of layer norms.
        condition_drop: share of training items that see the null condition, for classifier-free guidance.
        lengths, codebook_size, latent_dim, phi_kernel_sizes, phi_sharing, shared_codebook, metric: of the tokenizer's
            quantizer, see `SATConfig`.

    Raises:
        ValueError: a size below one, or heads that do not divide the width.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: int = 4
    condition_dim: int = 512
    cosine_attention: bool = True
    norm_eps: float = 1e-6
    condition_drop: float = 0.1
    lengths: tuple[int, ...] = field(default_factory=lambda: ak.ScaleSchedule.quadratic(16, 75).lengths)
    codebook_size: int = 1024
    latent_dim: int = 64
    phi_kernel_sizes: tuple[int, ...] = (9,) * 6
    phi_sharing: str = "partial"
    shared_codebook: bool = False
    metric: str = "euclidean"

    def __post_init__(self):
        for name in ("lengths", "phi_kernel_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("depth", "width", "heads", "mlp_ratio", "condition_dim", "codebook_size", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        if not 0 <= self.condition_drop <= 1:
            raise ValueError(f"condition_drop must be within 0..1, got {self.condition_drop}")

    @property
    def schedule(self) -> ak.ScaleSchedule:
        return ak.ScaleSchedule(self.lengths)

    @property
    def softmax_scale(self) -> float:
        """Factor of the logits besides the scale per head that cosine attention learns."""
        return 1.0 if self.cosine_attention else 0.25 / math.sqrt(self.width // self.heads)

    @classmethod
    def of_depth(cls, depth: int, **others) -> AARConfig:
        """The paper's family: width 64 times the depth, as many heads as blocks."""
        return cls(depth=depth, width=64 * depth, heads=depth, **others)

    @classmethod
    def from_dict(cls, values: dict) -> AARConfig:
        """The inverse of dataclasses.asdict, also through JSON.

        Raises:
            ValueError: a name that is not an attribute, or a value that no AAR can have.
        """
        return config_from_dict(cls, values)


Addend = tuple[Tensor, Tensor]
"""``y[B, L, C], gate[B, C]``: what is still to be added to the residual stream, ``gate * y``."""


class Block(nn.Module):
    """Attention and feed-forward layer of width C."""

    def __init__(self, config: AARConfig):
        super().__init__()
        width, hidden = config.width, config.width * config.mlp_ratio
        self.schedule, self.eps = config.schedule, config.norm_eps
        self.heads = config.heads
        self.softmax_scale = config.softmax_scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        if config.cosine_attention:
            self.log_scale = nn.Parameter(torch.full((config.heads,), math.log(4.0)))
        else:
            self.register_parameter("log_scale", None)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width)  # gates, scales and shifts of the two halves, in that order

    @property
    def qkv_bias(self) -> Tensor:
        """Keys have no bias: the softmax would not see it."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def forward(self, x: Tensor, addend: Addend | None, adaptive: Tensor) -> tuple[Tensor, Addend]:
        """The residual stream ``x[B, L, C]`` after the attention, and what is left to add to it.

        A block takes what the one before left: the last residual of one is the first layer norm's input of the next,
        and both are one pass over memory, while no block needs another's weights.

        Args:
            addend: of the block before.
            adaptive: ``[B, C]``, of which the modulation is made.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(adaptive).chunk(6, dim=-1)
        x, y = add_modulate(x, addend, scale1, shift1, self.eps)
        x, y = add_modulate(x, (self.attend(y), gate1), scale2, shift2, self.eps)
        return x, (self.feed_forward(y), gate2)

    def attend(self, x: Tensor) -> Tensor:
        """``[B, L, C]`` -> ``[B, L, C]``."""
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b l h d", three=3, h=self.heads)
        scale = {"softmax_scale": self.softmax_scale, "head_log_scale": self.log_scale}
        return self.proj(rearrange(ak.scale_attention(q, k, v, self.schedule, **scale), "b l h d -> b l (h d)"))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``[B, L, C]`` -> ``[B, L, C]``."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def add_modulate(x: Tensor, addend: Addend | None, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x`` and the addend, if there is one, and the layer norm of that, modulated: each ``[B, L, C]``."""
    if addend is None:
        return x, layer_norm_modulate(x, scale, shift, eps=eps)
    return gated_residual_modulate(x, *addend, scale, shift, eps=eps)


class AAR(Pretrained):
    """Next-scale transformer over the codes of a SAT.

    It holds a copy of the tokenizer's codebooks and phi (`set_quantizer`), so that it turns codes into inputs and
    samples codes by itself; those are not trained.

    Conditions are ``[B, condition_dim]``; None is the learned null condition.
    """

    config_class = AARConfig
    kind = "aar"

    def __init__(self, config: AARConfig | None = None):
        super().__init__()
        self.config = config = config or AARConfig()
        self.schedule = config.schedule
        width = config.width
        self.condition_in = nn.Linear(config.condition_dim, width, bias=False)
        self.condition_out = nn.Linear(width, width, bias=False)
        self.null_condition = nn.Parameter(torch.empty(config.condition_dim))
        self.start = nn.Parameter(torch.empty(self.schedule.lengths[0], width))
        self.position = nn.Parameter(torch.empty(self.schedule.total, width))
        self.level = nn.Parameter(torch.empty(self.schedule.num_scales, width))
        self.word = nn.Linear(config.latent_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.codebook_size)
        self.quantizer = ak.nn.MultiScaleResidualQuantizer(
            config.latent_dim, schedule=self.schedule, codebook_size=config.codebook_size,
            phi_kernel_sizes=config.phi_kernel_sizes, phi_sharing=config.phi_sharing,
            shared_codebook=config.shared_codebook, metric=config.metric, frozen=True,
        ).requires_grad_(False).eval()  # fmt: skip
        self.register_buffer("_scale_of_token", self.schedule.scale_of_token(), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation: blocks begin near the identity, and logits near equal."""
        width, depth = self.config.width, self.config.depth
        std = math.sqrt(1 / width / 3)
        for name, parameter in self.named_parameters():
            if name.startswith("quantizer.") or name.endswith("log_scale"):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(0.5)
        for block in self.blocks:
            block.proj.weight.div_(math.sqrt(2 * depth))
            block.fc2.weight.div_(math.sqrt(2 * depth))
            block.modulation.weight[: 2 * width].mul_(1e-5)
            block.modulation.weight[2 * width :].mul_(0.5)

    def train(self, mode: bool = True) -> AAR:
        super().train(mode)
        self.quantizer.eval()  # its codebooks are the tokenizer's and must not move
        return self

    @torch.no_grad()
    def set_quantizer(self, quantizer: nn.Module) -> AAR:
        """Copies the codebooks and phi of a tokenizer's quantizer (`SAT.quantizer`); returns the module.

        Raises:
            ValueError: a quantizer of other sizes than the configuration's.
        """
        ours = dict(self.quantizer.state_dict())
        not_ours = ("project_", "embed_avg", "cluster_size")
        theirs = {name: value for name, value in quantizer.state_dict().items() if not name.startswith(not_ours)}
        shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (ours, theirs)]
        lengths = tuple(quantizer.schedule.lengths), self.schedule.lengths
        if shapes[0] != shapes[1] or lengths[0] != lengths[1]:
            raise ValueError(
                f"the tokenizer does not fit the model: lengths {lengths[0]} and codebooks {shapes[1]['codebooks']}, "
                f"where the model has {lengths[1]} and {shapes[0]['codebooks']}"
            )
        self.quantizer.load_state_dict(theirs)
        return self

    def forward(self, condition: Tensor | None, tokens: Tensor) -> Tensor:
        """Teacher-forced logits ``[B, total, codebook_size]`` in fp32 (fp64 if the model is).

        Args:
            condition: ``[B, condition_dim]``, or None. In training mode each item loses it with `condition_drop`.
            tokens: codes ``[B, total]`` int64, or the inputs ``[B, total - lengths[0], latent_dim]`` that
                `MultiScaleResidualQuantizer.next_scale_inputs` makes of them.

        Raises:
            ValueError: shapes that do not fit.
        """
        inputs = self._inputs(tokens)
        embedding = self.embed_condition(self.conditions(condition, inputs.shape[0]))
        x = torch.cat([self.first_tokens(embedding), self.word(inputs) + self.places(1, self.schedule.num_scales)], 1)
        adaptive, addend = F.silu(embedding), None
        for block in self.blocks:
            x, addend = block(x, addend, adaptive)
        scale, shift = self.head_modulation(adaptive).chunk(2, dim=-1)
        _, y = add_modulate(x, addend, scale, shift, self.config.norm_eps)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(y.to(self.head.weight.dtype))

    def loss(self, condition: Tensor | None, codes: Tensor) -> Tensor:
        """Mean cross entropy of ``codes[B, total]`` in nats per token."""
        logits = self(condition, codes)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def sample(self, condition: Tensor | None = None, **options) -> Tensor:
        """Codes ``[B, total]`` int64, scale by scale: see `aar.models.generation.sample`."""
        from .generation import sample

        return sample(self, condition, **options)

    def embed_condition(self, condition: Tensor) -> Tensor:
        """``[B, condition_dim]`` -> ``[B, C]``."""
        return self.condition_out(F.gelu(self.condition_in(condition), approximate="tanh"))

    def first_tokens(self, embedding: Tensor) -> Tensor:
        """The tokens of the first scale, ``[B, lengths[0], C]``, from the embedded condition ``[B, C]``."""
        return embedding[:, None] + self.start + self.places(0, 1)

    def places(self, first: int, last: int) -> Tensor:
        """What tells tokens of scales first to last their level and position: ``[tokens, C]``."""
        tokens = slice(self.schedule.offsets[first], self.schedule.offsets[last])
        return self.level[self._scale_of_token[tokens]] + self.position[tokens]

    def conditions(self, condition: Tensor | None, batch: int) -> Tensor:
        """``[batch, condition_dim]``: the null condition for None, and in training mode for items that lose theirs."""
        null = self.null_condition.expand(batch, -1)
        if condition is None:
            return null
        if condition.shape != null.shape or not condition.is_floating_point():
            got = f"{condition.dtype} {list(condition.shape)}"
            raise ValueError(f"condition must be floating point {list(null.shape)}, got {got}")
        condition = condition.to(null.dtype)
        if self.training and self.config.condition_drop > 0:
            dropped = torch.rand(batch, 1, device=condition.device) < self.config.condition_drop
            condition = torch.where(dropped, null, condition)
        return condition

    def _inputs(self, tokens: Tensor) -> Tensor:
        if tokens.dim() == 2:
            with torch.no_grad():
                return self.quantizer.next_scale_inputs(tokens)
        wanted = (self.schedule.total - self.schedule.lengths[0], self.config.latent_dim)
        if tokens.dim() != 3 or tuple(tokens.shape[1:]) != wanted:
            wanted = f"codes [B, {self.schedule.total}] or inputs [B, {wanted[0]}, {wanted[1]}]"
            raise ValueError(f"tokens must be {wanted}, got {list(tokens.shape)}")
        return tokens
