"""`convolve`: gradients against float64, and as a citizen of autograd and torch.compile."""

from __future__ import annotations

import random

import pytest
import torch
from gradient_cases import check_gradients, gradients, make_trained_layers, mapped
from helpers import require
from seanet_cases import make_conv, make_input, make_residual

from aar_kernels import BackendError
from aar_kernels.seanet import Conv, ConvTranspose, Norm, Residual, convolve, pack, stack

CONV = Conv(torch.randn(5, 3, 4), torch.randn(5), stride=2, elu=True)
X = torch.randn(2, 3, 10)


@pytest.fixture
def native():
    return require("seanet_layer", "native")


@pytest.mark.parametrize("seed", range(90))
def test_gradients(native, seed):
    check_gradients(seed, native)


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_several_blocks(native, seed):
    """With as many threads as make a block longer or shorter."""
    check_gradients(seed, native, 1500)


@pytest.mark.parametrize("dilation", [1, 9, 100, 700])
@pytest.mark.parametrize("options", [{"reflect": False}, {}, {"causal": True}], ids=str)
def test_padding_longer_than_a_block(native, dilation, options):
    """What mirrors a step of padding is found, wherever a block ends."""
    torch.manual_seed(dilation)
    conv = Conv(torch.randn(3, 2, 3), torch.randn(3), dilation=dilation, elu=True, **options)
    narrow = Conv(torch.randn(2, 3, 1), elu=True)
    for length in (1, 700, 1301, 3000):
        x = torch.randn(1, 2, length)
        for layers in ([conv], [Residual(conv, narrow)]):
            found, exact = gradients(layers, x, native), gradients(layers, x, "reference", torch.float64)
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_gradients_do_not_depend_on_threads(native):
    before = torch.get_num_threads()
    try:
        for seed in range(6):
            layers, found = make_trained_layers(seed), []
            first = layers[0].first if isinstance(layers[0], Residual) else layers[0]
            x = make_input(seed, first.weight.shape[0 if isinstance(first, ConvTranspose) else 1], 1200)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(gradients(layers, x, native))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), seed
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(6))
def test_the_result_is_that_of_a_stack(backend, seed):
    layers = make_trained_layers(seed)
    packed = pack(layers)
    x = make_input(seed, packed.fields[0].inputs)
    torch.testing.assert_close(convolve(x, layers, backend=backend), stack(x, packed, backend=backend))


@pytest.mark.parametrize("layer", [CONV, ConvTranspose(torch.randn(3, 2, 5), torch.randn(2), 2, elu=True)])
def test_gradcheck_of_the_reference(layer):
    inputs = [tensor.double().requires_grad_() for tensor in (X, layer.weight, layer.bias)]

    def run(x, weight, bias):
        return convolve(x, [type(layer)(weight, bias, layer.stride, elu=True)], backend="reference")

    assert torch.autograd.gradcheck(run, inputs)


def test_opcheck(native):
    for seed in range(4):
        packed = pack(make_trained_layers(seed)[:1])
        x = make_input(seed, packed.fields[0].inputs, 20).mT.contiguous().requires_grad_()
        arguments = (x, packed.weights.clone().requires_grad_(), packed.layers, native)
        torch.library.opcheck(torch.ops.aar_kernels.seanet_layer.default, arguments)


def test_only_what_is_asked_for(native):
    """The wave needs no gradient, and gets none; weights that are frozen get none either."""
    weight = CONV.weight.clone().requires_grad_()
    layer = Conv(weight, None, 2)
    convolve(X, [layer], backend=native).sum().backward()
    plain = torch.autograd.grad(convolve(X, [layer], backend="reference").sum(), weight)[0]
    torch.testing.assert_close(weight.grad, plain)
    x = X.clone().requires_grad_()
    convolve(x, [mapped(CONV, torch.Tensor.detach)], backend=native).sum().backward()
    assert x.grad.shape == x.shape


def test_compiled(native):
    torch.manual_seed(0)
    chance = random.Random(0)
    layers = [make_conv(chance, 3, 8, stride=2, dilation=1, kernel=7), make_residual(chance, 8, 8)]

    weights: list[torch.Tensor] = []

    def leaf(weight):
        weights.append(weight.clone().requires_grad_())
        return weights[-1]

    trained = [mapped(layer, leaf) for layer in layers]

    def run(x):
        return convolve(x, trained, backend=native).square().sum()

    def gradients_of(function):
        loss = function(X)
        return [loss, *torch.autograd.grad(loss, weights)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for expected, found in zip(gradients_of(run), gradients_of(compiled), strict=True):
        torch.testing.assert_close(found, expected)


def test_no_second_derivative(native):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(convolve(x, [CONV], backend=native).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_wrong_input(backend):
    for x in (X[:, :2], X[0], X[..., :0], X.double()):
        with pytest.raises(ValueError, match=r"x must be torch\.float32 \[B, 3, T\] with T at least 1, got"):
            convolve(x, [CONV], backend=backend)
    with pytest.raises(ValueError, match="a stack needs a layer"):
        convolve(X, [], backend=backend)
    with pytest.raises(ValueError, match="a layer of 3 channels follows one of 5"):
        convolve(X, [CONV, CONV], backend=backend)
    with pytest.raises(ValueError, match="needs all of a signal"):
        convolve(X, [Conv(CONV.weight, norm=Norm(torch.ones(5), torch.zeros(5)))], backend=backend)
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        convolve(X.to("meta"), [CONV], backend=backend)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"stride": 2, "dilation": 2}, "dilation of a convolution with strides"),
        ({"snake": torch.ones(3)}, "gradients of Snake"),
        ({"stride": 2, "symmetric": True}, "gradients of symmetric padding"),
    ],
)
def test_what_runs_on_the_reference_alone(native, options, what):
    layer = Conv(torch.randn(5, 3, 4, requires_grad=True), **options)
    with pytest.raises(BackendError, match=f"native: has no {what}"):
        convolve(X, [layer], backend=native)
    y = convolve(X, [layer])
    assert torch.equal(y, convolve(X, [layer], backend="reference"))
    y.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_the_binding_checks_what_could_read_outside(native):
    call, packed, x = torch.ops.aar_native.seanet_backward, pack([CONV]), X.mT.contiguous()
    grad = torch.randn(2, 5, 5)

    def changed(**values):
        return [int(number) for number in packed.fields[0]._replace(**values)]

    for wrong in (
        (X, packed.weights, list(packed.layers), grad, True),
        (x, packed.weights[:-1], list(packed.layers), grad, True),
        (x, packed.weights.bfloat16(), list(packed.layers), grad, True),
        (x, packed.weights, list(packed.layers) * 2, grad, True),
        (x, packed.weights, changed(padding=2), grad, True),
        (x, packed.weights, changed(dilation=2), grad, True),
        (x, packed.weights, changed(padding=3), grad, True),
        (x, torch.cat([packed.weights, torch.zeros(16)]), changed(activation=2), grad, True),
        (x, packed.weights, list(packed.layers), grad[:, :4].contiguous(), True),
        (x, packed.weights, list(packed.layers), grad.double(), True),
        (x[:, :0], packed.weights, list(packed.layers), grad[:, :0], True),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
