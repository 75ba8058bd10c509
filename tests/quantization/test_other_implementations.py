"""vector-quantize-pytorch, by other authors, agrees with ours where both compute the same thing."""

from __future__ import annotations

import pytest
import torch

from aar_kernels import ScaleSchedule
from aar_kernels.quantization import Levels, decode, encode, quantize

vector_quantize_pytorch = pytest.importorskip("vector_quantize_pytorch")


def fill(theirs, codebooks) -> None:
    """Their layers with our codebooks; a shared one fills all."""
    with torch.no_grad():
        for s, layer in enumerate(theirs):
            layer._codebook.embed.copy_(codebooks[s if len(codebooks) > 1 else 0][None])


@pytest.mark.parametrize("shared", [False, True])
def test_residual_vq(backend, shared):
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(1 if shared else 6, 50, 24, generator=generator) / 2
    theirs = vector_quantize_pytorch.ResidualVQ(
        dim=24, num_quantizers=6, codebook_size=50, kmeans_init=False, shared_codebook=shared
    ).eval()
    fill(theirs.layers, codebooks)
    x = torch.randn(3, 17, 24, generator=generator)
    with torch.no_grad():
        quantized, indices, _ = theirs(x)

    levels = Levels(ScaleSchedule([17] * 6), codebooks)
    codes = encode(x.mT, levels, backend=backend)
    assert torch.equal(codes.view(3, 6, 17).permute(0, 2, 1), indices)
    torch.testing.assert_close(decode(codes, levels, backend=backend), quantized.mT)


@pytest.mark.parametrize("kernels", [0, 1, 3, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_hierarchical_vq(backend, kernels, masked, shared):
    """Area pooling, linear upsampling and phi are the same there: ``quant_resi=0.5`` is our phi, of width 3.

    Their partial sharing takes kernel ``round(s / (S - 1) * (K - 1))``, not the published ticks; the index is
    data here, so theirs is passed. Training is not compared: their loss and straight-through estimator are
    about the pooled rows of a scale, ours (and the paper's) about the residual at the full rate.
    """
    generator = torch.Generator().manual_seed(0)
    lengths, length, dim, size = (1, 2, 5, 9, 14), 20, 16, 40
    scales = len(lengths)
    codebooks = torch.randn(1 if shared else scales, size, dim, generator=generator) / 2
    theirs = vector_quantize_pytorch.HierarchicalVQ(
        dim=dim, codebook_size=size, scales=lengths, shared_codebook=shared, kmeans_init=False,
        quant_resi=0.5 if kernels else 0.0, share_quant_resi=max(kernels, 1),
    ).eval()  # fmt: skip
    fill([theirs.vq] if shared else theirs.vqs, codebooks)
    convs = [phi.conv for phi in theirs.phi_levels or [theirs.phi_shared]][:kernels]
    index = [round(s / (scales - 1) * (kernels - 1)) for s in range(scales)] if kernels else []
    levels = Levels(
        ScaleSchedule(lengths),
        codebooks,
        [c.weight.detach() for c in convs],
        [c.bias.detach() for c in convs],
        index,
    )
    x = torch.randn(4, dim, length, generator=generator)
    mask = torch.arange(length) < torch.tensor([20, 11, 4, 1])[:, None] if masked else None
    with torch.no_grad():
        quantized, indices, _ = theirs(x, mask=mask)

    codes = encode(x, levels, mask=mask, backend=backend)
    assert torch.equal(codes, torch.cat(indices, dim=1))
    assert (codes == -1).any() == masked
    ours, _, _, _ = quantize(x, levels, mask=mask, straight_through="once", backend=backend)
    torch.testing.assert_close(ours, quantized)
    with torch.no_grad():
        decoded = theirs.get_output_from_indices(indices, full_shape=length)
        torch.testing.assert_close(decode(codes, levels, length=length, backend=backend), decoded)
