"""Wrong input meets the same answer on every backend: an error that names what is wrong."""

from __future__ import annotations

import pytest
import torch
from seanet_cases import make_lstm

from aar_kernels import BackendError
from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet import LSTM, Conv, ConvTranspose, Residual, lstm, pack, pack_lstm, stack

CONV = Conv(torch.randn(5, 3, 4), torch.randn(5), stride=2)
PACKED = pack([CONV])
PACKED_LSTM = pack_lstm(make_lstm(0, 6, 1)[0])
X, Y = torch.randn(2, 3, 10), torch.randn(2, 6, 10)


@pytest.mark.parametrize("x", [X[:, :2], X[0], X[..., :0], X.int(), X.double(), X.half()])
def test_wrong_input(backend, x):
    with pytest.raises(ValueError, match=r"x must be torch\.float32 \[B, 3, T\] with T at least 1, got"):
        stack(x, PACKED, backend=backend)


@pytest.mark.parametrize("x", [X.bfloat16(), X.double()])
def test_bf16_weights_take_fp32(backend, x):
    with pytest.raises(ValueError, match=r"x must be torch\.float32 \[B, 3, T\] with T at least 1, got"):
        stack(x, pack([CONV], dtype=torch.bfloat16), backend=backend)


@pytest.mark.parametrize("x", [Y[:, :2], Y[0], Y[..., :0], Y.double()])
def test_wrong_input_of_the_lstm(backend, x):
    with pytest.raises(ValueError, match=r"x must be torch\.float32 \[B, 6, T\] with T at least 1, got"):
        lstm(x, PACKED_LSTM, backend=backend)


@pytest.mark.parametrize("state", [torch.zeros(1, 2, 3, 6), torch.zeros(2, 2, 2, 6), torch.zeros(1, 2, 2, 6).double()])
def test_wrong_state_of_the_lstm(backend, state):
    with pytest.raises(ValueError, match=r"state must be torch\.float32 \[1, 2, 2, 6\], got"):
        lstm(Y, PACKED_LSTM, state=state, backend=backend)


def test_wrong_block(backend):
    with pytest.raises(ValueError, match="block must not be negative"):
        stack(X, PACKED, block=-1, backend=backend)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "a stack needs a layer"),
        (["conv"], "a layer is a Conv, ConvTranspose or Residual, got str"),
        ([Conv(torch.randn(5, 3))], "weight must be floating point in 3 dimensions"),
        ([Conv(torch.ones(5, 3, 1).int())], "weight must be floating point in 3 dimensions"),
        ([Conv(torch.randn(5, 0, 1))], "weight must be floating point in 3 dimensions"),
        ([Conv(torch.randn(5, 3, 1), torch.randn(3))], r"bias must be \[5\], got \[3\]"),
        ([Conv(torch.randn(5, 3, 2), stride=3)], "does not cover a stride of 3"),
        ([Conv(torch.randn(5, 3, 2), stride=0)], "does not cover a stride of 0"),
        ([ConvTranspose(torch.randn(5, 3, 2), stride=3)], "does not cover a stride of 3"),
        ([CONV, CONV], "a layer of 3 channels follows one of 5"),
        ([Residual(CONV, CONV)], "a first convolution of stride 1, and then convolutions of one tap"),
        ([Residual(Conv(torch.randn(5, 3, 3)), Conv(torch.randn(3, 5, 3)))], "convolutions of one tap"),
        ([Residual(Conv(torch.randn(5, 3, 3)), Conv(torch.randn(4, 5, 1)))], "do not fit together"),
        ([Residual(Conv(torch.randn(5, 3, 3)), Conv(torch.randn(3, 4, 1)))], "do not fit together"),
        ([Residual(Conv(torch.ones(5, 3, 3)), Conv(torch.ones(3, 5, 1)), Conv(torch.ones(4, 3, 1)))], "fit together"),
    ],
)
def test_layers_that_cannot_be(layers, message):
    with pytest.raises(ValueError, match=message):
        pack(layers)


def test_lstm_that_cannot_be():
    with pytest.raises(ValueError, match="an LSTM needs a layer"):
        pack_lstm(LSTM([]))
    with pytest.raises(ValueError, match=r"\[4 C, C\] twice and \[4 C\] twice, got"):
        pack_lstm(LSTM(torch.nn.LSTM(3, 6).all_weights))  # another input size
    with pytest.raises(ValueError, match="layers that do not follow each other"):
        PackedSEANet([CONV, make_lstm(0, 6, 1)[0]])
    with pytest.raises(ValueError, match="layers that do not follow each other"):
        PackedSEANet([])


def test_gradients(backend):
    for run, x, packed in ((stack, X, PACKED), (lstm, Y, PACKED_LSTM)):
        x = x.clone().requires_grad_()
        with pytest.raises(ValueError, match="not differentiable"):
            run(x, packed, backend=backend)
        with torch.no_grad():
            run(x, packed, backend=backend)
    trained = Conv(CONV.weight.clone().requires_grad_())
    assert not stack(X, pack([trained]), backend=backend).requires_grad


def test_a_forced_backend_that_cannot_run_says_why():
    exact = pack([CONV], dtype=torch.float64)
    with pytest.raises(BackendError, match=r"native: (computes in float32, not in torch\.float64|no native library)"):
        stack(X.double(), exact, backend="native")
    for run, x, packed in ((stack, X, PACKED), (lstm, Y, PACKED_LSTM)):
        with pytest.raises(BackendError, match="flash: has no kernel for this operator"):
            run(x, packed, backend="flash")


def test_devices_must_agree(backend):
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        stack(X.to("meta"), PACKED, backend=backend)


def test_the_binding_checks_what_could_read_outside(fast):
    """It is the last line before raw pointers."""
    call, weights, fields = torch.ops.aar_native.seanet_stack, PACKED.weights, list(PACKED.layers)

    def changed(**values):
        return [int(number) for number in PACKED.fields[0]._replace(**values)]

    x = X.mT.contiguous()
    for wrong in (
        (X, weights, fields, 0),
        (x[:, :0], weights, fields, 0),
        (x, weights, fields, -1),
        (x, weights, fields[:-1], 0),
        (x, weights, [], 0),
        (x, weights[:-1], fields, 0),
        (x, torch.cat([weights, weights[:1]]), fields, 0),
        (x, weights, changed(kind=3), 0),
        (x, weights, changed(padding=4), 0),
        (x[:, :3].contiguous(), weights, changed(padding=2), 0),
        (x, weights, changed(stride=5), 0),
        (x, weights, changed(kernel=0), 0),
        (x, weights, changed(kind=2, stride=1), 0),
        (x, weights.double(), fields, 0),
        (x, weights[:-1].bfloat16(), fields, 0),
        (X.mT, weights, fields, 0),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
    call = torch.ops.aar_native.seanet_stack_chunk
    fields, size = changed(padding=1), pack([CONV])._replace(layers=tuple(changed(padding=1))).state_size
    state = torch.zeros(2, size)
    for wrong in (
        (x, weights, fields, state[:, :-1].contiguous(), 0, False, 0),
        (x, weights, fields, state[:1].contiguous(), 0, False, 0),
        (x, weights, fields, state.double(), 0, False, 0),
        (x, weights, fields, state, -2, False, 0),
        (x, weights, fields, state, 1, False, 0),
        (x[:, :9].contiguous(), weights, fields, state, 2, False, 0),
        (x[:, :2].contiguous(), weights, fields, state, 0, False, 0),
        (x[:, :0].contiguous(), weights, fields, state, 2, True, 0),
        (x, weights, list(PACKED.layers), state, 0, False, 0),
        (X, weights, fields, state, 0, False, 0),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
    call, weights, y = torch.ops.aar_native.seanet_lstm, PACKED_LSTM.weights.flatten(), Y.mT.contiguous()
    for wrong in (
        (Y, weights, 1, True, None),
        (y[:, :0], weights, 1, True, None),
        (y, weights, 0, True, None),
        (y, weights, 2, True, None),
        (y, weights[:-1], 1, True, None),
        (y, weights.double(), 1, True, None),
        (y, weights[:-1].bfloat16(), 1, True, None),
        (y, weights, 1, True, torch.zeros(1, 2, 1, 6)),
    ):
        with pytest.raises(RuntimeError, match="aar_native"):
            call(*wrong)
