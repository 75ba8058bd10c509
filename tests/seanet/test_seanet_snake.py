"""Snake and symmetric padding: DAC's layers on every backend, against plain PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_as_accurate
from seanet_cases import CHANNELS, check_bf16, check_stack, inputs_of, make_input
from snake_cases import long_enough, make_dac_layers, make_unit, with_snake
from stream_cases import in_chunks, make_causal
from torch import Tensor, nn

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import Conv, ConvTranspose, Norm, Residual, Stream, Tanh, pack, stack


def snake(x: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.to(x.dtype)[:, None]
    return x + 1 / (alpha + 1e-9) * torch.sin(alpha * x) ** 2


@pytest.mark.parametrize("seed", range(60))
def test_random_stacks(fast, seed):
    layers = make_dac_layers(seed)
    check_stack(layers, long_enough(layers, make_input(seed, inputs_of(layers))), fast)


@pytest.mark.parametrize("dilation", [1, 3, 9])
@pytest.mark.parametrize("channels", CHANNELS)
def test_residual_unit(backend, channels, dilation):
    torch.manual_seed(channels)
    unit = make_unit(channels, dilation)
    x = torch.randn(2, channels, 300)
    first, narrow = unit.first, unit.narrow

    def plain(x):
        def conv(x, layer, **options):
            return torch.conv1d(snake(x, layer.snake), layer.weight.to(x.dtype), layer.bias.to(x.dtype), **options)

        return x + conv(conv(x, first, padding=3 * dilation, dilation=dilation), narrow)

    assert_as_accurate(stack(x, pack([unit]), backend=backend), plain(x), plain(x.double()))


@pytest.mark.parametrize("dilation", [1, 9])
def test_a_wide_unit(fast, dilation):
    """Of so many weights that more rows share them."""
    torch.manual_seed(dilation)
    check_stack([make_unit(200, dilation)], torch.randn(2, 200, 250), fast)


@pytest.mark.parametrize("length", [9, 10, 11, 12, 13, 14, 100])
@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (6, 3), (10, 5), (5, 2), (8, 3), (3, 3)])
def test_symmetric_padding(backend, kernel, stride, length):
    """What PyTorch's own modules give whose padding is half of what a kernel has beyond its stride, rounded up."""
    torch.manual_seed(length)
    padding = -(-(kernel - stride) // 2)
    x = torch.randn(2, 5, length)
    for make, layer in ((nn.Conv1d, Conv), (nn.ConvTranspose1d, ConvTranspose)):
        module = make(5, 20, kernel, stride, padding).requires_grad_(False)
        options = {"reflect": False} if layer is Conv else {}
        packed = pack([layer(module.weight, module.bias, stride, symmetric=True, **options)])
        result = stack(x, packed, backend=backend)
        assert_as_accurate(result, module(x), module.double()(x.double()))


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.5, 17.0, 1e-3])
def test_each_value_that_can_matter(backend, alpha):
    """Near zero, at zeros of the sine, and so large that the sine is all rounding; in units of the input's last
    place, for a step of the argument's moves the sine by as much."""
    powers = torch.logspace(-8, 12, 5001)
    x = torch.cat([torch.linspace(-20, 20, 20001), powers, -powers, torch.arange(3000) * torch.pi / alpha])
    packed = pack([Conv(torch.ones(1, 1, 1), snake=torch.tensor([alpha]))])
    exact = snake(x[None].double(), torch.tensor([alpha]))[0]
    ours = stack(x[None, None], packed, backend=backend)[0, 0]
    assert ((ours - exact).abs() <= 4 * torch.finfo(torch.float32).eps * x.abs()).all()
    special = stack(torch.tensor([[[torch.nan, torch.inf, -torch.inf]]]), packed, backend=backend)
    assert special.isnan().all()


def test_no_alpha_is_the_identity(backend):
    packed = pack([Conv(torch.eye(3)[..., None], snake=torch.zeros(3))])
    x = torch.randn(1, 3, 50)
    assert torch.equal(stack(x, packed, backend=backend), x)


@pytest.mark.parametrize("seed", range(8))
def test_bf16_weights(backend, seed):
    layers = make_dac_layers(seed)
    check_bf16(layers, long_enough(layers, make_input(seed, inputs_of(layers))), backend)


@pytest.mark.parametrize("seed", range(6))
def test_streams(backend, seed):
    net = PackedSEANet([with_snake(layer) for layer in make_causal(seed, False)])
    stream = Stream(net)
    for length in (17 * stream.hop, 6 * stream.hop + 1, 1):
        x = torch.randn(2, net.inputs, length)
        streamed, whole = in_chunks(stream, x, seed, backend=backend), net(x, backend=backend)
        torch.testing.assert_close(streamed, whole)
        assert backend != "native" or torch.equal(streamed, whole)


def test_norms_and_tanh(backend):
    torch.manual_seed(0)
    unit = make_unit(8, 1)
    normed = Residual(replace(unit.first, norm=Norm(torch.randn(8), torch.randn(8))), unit.narrow)
    x = torch.randn(2, 8, 40)
    for layers in ([normed], [unit], [unit, normed]):
        nets = [PackedSEANet([*layers, *end]) for end in ([], [Tanh()])]
        outs = [net(x, backend=backend) for net in nets]
        assert torch.equal(outs[0].tanh(), outs[1])
        exact = PackedSEANet(layers, dtype=torch.float64)(x.double(), backend="reference")
        assert_as_accurate(outs[0], nets[0](x, backend="reference"), exact)


SNAKE = Conv(torch.randn(5, 3, 4), stride=2, snake=torch.ones(3))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([replace(SNAKE, snake=torch.ones(5))], r"snake must be \[3\], in place of ELU, got \[5\], ELU False"),
        ([replace(SNAKE, elu=True)], r"snake must be \[3\], in place of ELU, got \[3\], ELU True"),
        ([replace(SNAKE, symmetric=True, causal=True)], "either causal or symmetric"),
        ([replace(make_unit(3, 1), narrow=Conv(torch.randn(3, 3, 1)))], "two Snakes or none"),
        ([replace(make_unit(3, 1), shortcut=make_unit(3, 1).narrow)], "none in its shortcut"),
        ([replace(make_unit(3, 1), first=replace(make_unit(3, 1).first, weight=torch.randn(3, 3, 2), symmetric=True))],
         "keeps the number of steps"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be(layers, message):
    with pytest.raises(ValueError, match=message):
        pack(layers)


def test_too_short_a_signal(backend):
    with pytest.raises(ValueError, match="1 steps are fewer than a layer reads"):
        stack(torch.randn(1, 3, 1), pack([replace(SNAKE, symmetric=True)]), backend=backend)


def test_a_stream_needs_causal_layers():
    with pytest.raises(ValueError, match="a stream needs causal layers"):
        Stream(PackedSEANet([Conv(torch.randn(5, 3, 2), stride=2, symmetric=True)]))


def test_the_binding_checks_what_could_read_outside(fast):
    packed = pack([SNAKE])
    x, fields = torch.randn(1, 10, 3), packed.fields[0]
    for weights, changes in ((packed.weights[:-16], {}), (packed.weights, {"activation": 3}),
                             (packed.weights, {"activation": 1}), (packed.weights, {"padding": 4})):  # fmt: skip
        with pytest.raises(RuntimeError, match="aar_native"):
            torch.ops.aar_native.seanet_stack(x, weights, list(fields._replace(**changes)), 0)
