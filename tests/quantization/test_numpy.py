"""The NumPy binding: equal to the reference, clear about bad input, and free of torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from aar_kernels.quantization import Levels, decode, encode
from aar_kernels.schedule import ScaleSchedule

numpy_binding = pytest.importorskip("aar_kernels.numpy")

LENGTHS = (1, 3, 4, 9)


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def both(books, widths, index, metric):
    codebooks = draw(books, 50, 10)
    weights = [draw(10, 10, width) / 10 for width in widths]
    biases = [draw(10) for _ in widths]
    ours = numpy_binding.Quantizer(LENGTHS, codebooks, weights, biases, index, metric == "cosine")
    tensors = [[torch.from_numpy(a).double() for a in arrays] for arrays in ([codebooks], weights, biases)]
    return ours, Levels(ScaleSchedule(LENGTHS), tensors[0][0], tensors[1], tensors[2], index, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    ("books", "widths", "index"),
    [(4, (), ()), (4, (3,), (0, 0, 0, 0)), (1, (3, 5), (0, 0, 1, 1)), (4, (1, 3, 5, 9), (3, 2, 1, 0))],
)
@pytest.mark.parametrize("length", [9, 13])
def test_equals_the_reference(books, widths, index, metric, length):
    ours, levels = both(books, widths, index, metric)
    x = draw(5, length, 10)
    codes = ours.encode(x)
    expected = encode(torch.from_numpy(x).double().mT, levels, backend="reference")
    # Drawn so that no code hangs on rounding: the closest float64 decision of these cases is far above fp32's.
    assert np.array_equal(codes, expected.numpy())
    rows = decode(expected, levels, length=length, backend="reference").mT.numpy()
    error = np.abs(ours.decode(codes, length) - rows).max()
    assert error <= 64 * np.finfo(np.float32).eps * np.abs(rows).max()


def test_bad_input():
    ours, _ = both(4, (3,), (0, 0, 0, 0), "euclidean")
    with pytest.raises(ValueError, match="latent"):
        ours.encode(draw(2, 9, 11))
    with pytest.raises(ValueError, match="codes must be"):
        ours.decode(np.zeros((2, 16), np.int64), 9)
    for bad in (-2, 50):
        with pytest.raises(IndexError, match="codes must be in"):
            ours.decode(np.full((2, 17), bad), 9)
    with pytest.raises(ValueError, match="positive"):
        numpy_binding.Quantizer((1, 0), draw(2, 5, 3))
    with pytest.raises(ValueError, match="codebooks"):
        numpy_binding.Quantizer((1, 2, 3), draw(2, 5, 3))
    with pytest.raises(ValueError, match="phi"):
        numpy_binding.Quantizer((1, 2), draw(2, 5, 3), [draw(3, 3, 3)], [draw(3)], [0, 1])


def test_nan_and_empty_batch():
    ours, _ = both(4, (3,), (0, 0, 0, 0), "euclidean")
    x = draw(3, 9, 10)
    clean = ours.encode(x)
    x[1, 4, 2] = np.nan
    codes = ours.encode(x)
    assert (codes[1] == -1).all()
    assert np.array_equal(codes[[0, 2]], clean[[0, 2]])
    assert ours.encode(x[:0]).shape == (0, 17)
    assert ours.decode(codes[:0], 9).shape == (0, 9, 10)


def test_needs_no_torch():
    script = """
import sys
sys.modules["torch"] = None  # importing it now fails
import numpy as np
from aar_kernels.numpy import Quantizer
codes = Quantizer([1, 2], np.ones((2, 5, 3), np.float32)).encode(np.ones((4, 2, 3), np.float32))
assert codes.shape == (4, 3)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
