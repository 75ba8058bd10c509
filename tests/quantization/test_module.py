"""`MultiScaleResidualQuantizer`: how it is laid out and how its codebooks learn."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from aar_kernels import ScaleSchedule, use_backend
from aar_kernels.nn import MultiScaleResidualQuantizer
from aar_kernels.quantization import phi_sharing_index
from aar_kernels.quantization.kmeans import kmeans, nearest
from aar_kernels.quantization.reference import area_down

SCHEDULE = ScaleSchedule((1, 3, 6, 10))


@pytest.fixture(autouse=True)
def run_on(backend):
    torch.manual_seed(0)
    with use_backend(backend):
        yield


def build(**options) -> MultiScaleResidualQuantizer:
    defaults = {
        "dim": 8, "schedule": SCHEDULE, "codebook_size": 16, "phi_kernel_sizes": (3, 5), "kmeans_init": False,
        "dead_code_threshold": 0,
    }  # fmt: skip
    return MultiScaleResidualQuantizer(**defaults | options)


def searched_rows(module: MultiScaleResidualQuantizer, x: Tensor, codes: Tensor) -> list[Tensor]:
    """Per scale the rows ``[B * n, D]`` that its search saw."""
    before = torch.cat([torch.zeros_like(x)[None], module.decode_scales(codes, length=x.shape[2])[:-1]])
    return [
        area_down((x - f_hat).mT, n).flatten(0, 1)
        for f_hat, n in zip(before, module.schedule.lengths, strict=False)
    ]


# ----------------------------------------------------------------------------------------------------------
# layout


def test_phi_sharing_is_the_published_one():
    """Six kernels over sixteen scales: s=5 is an exact float64 tie and s=10 is decided by the last bit."""
    assert phi_sharing_index(6, 16) == (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5)


def test_four_kernels_have_ticks_of_their_own():
    """VAR sets K = 4 apart: ticks from 1/(3 K), where others begin at 1/(2 K). Literals from its public
    code."""
    assert phi_sharing_index(4, 6) == (0, 0, 1, 2, 3, 3)
    assert phi_sharing_index(5, 6) == (0, 0, 1, 2, 3, 4)
    # 4/16 is half way between 1/8 and 3/8, and would get kernel 0; it is nearer to 13/36 than to 1/12.
    assert phi_sharing_index(4, 17)[4] == 1


@pytest.mark.parametrize(
    ("sizes", "sharing", "kernels", "index"),
    [
        ((9, 9), "partial", 2, (0, 0, 1, 1)),
        ((3,), "none", 4, (0, 1, 2, 3)),
        ((3, 5, 7, 9), "none", 4, (0, 1, 2, 3)),
        ((9, 9, 9), "full", 1, (0, 0, 0, 0)),
        ((), "partial", 0, ()),
    ],
)
def test_phi_options(sizes, sharing, kernels, index):
    module = build(phi_kernel_sizes=sizes, phi_sharing=sharing)
    assert len(module.phi) == kernels
    assert tuple(module.phi_index) == index


@pytest.mark.parametrize(
    "options",
    [{"phi_kernel_sizes": (4,)}, {"phi_sharing": "some"}, {"phi_kernel_sizes": (3, 5), "phi_sharing": "none"},
     {"metric": "manhattan"}, {"phi_kernel_sizes": (3, 5), "phi_sharing": "full"}],
)  # fmt: skip
def test_wrong_options_are_refused_at_construction(options):
    with pytest.raises(ValueError, match=r"phi|metric"):
        build(**options)


def test_an_unknown_straight_through_is_refused():
    with pytest.raises(ValueError, match="straight_through"):
        build(straight_through="twice")(torch.randn(1, 8, 10))


def test_a_shared_codebook_is_one_tensor_for_all_scales():
    module = build(shared_codebook=True)
    assert module.codebooks.shape == (1, 16, 8)
    codes = module.encode(torch.randn(2, 8, 10))
    assert codes.shape == (2, SCHEDULE.total)


def test_projections_surround_the_latent_space():
    """The same quantizer without projections, given projected input, finds the same codes."""
    module = build(dim=12, latent_dim=8)
    inner = build()
    inner.load_state_dict({k: v for k, v in module.state_dict().items() if "project" not in k})
    x = torch.randn(2, 12, 10)
    with torch.no_grad():
        codes = module.encode(x)
        assert torch.equal(codes, inner.encode(module.project_in(x.mT).mT))
        expected = module.project_out(inner.decode(codes).mT).mT
        assert torch.equal(module.decode(codes), expected)


# --------------------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize(("straight_through", "multiplicity"), [("per_scale", 4), ("once", 1)])
def test_straight_through_multiplicity(straight_through, multiplicity):
    """Each of S estimators passes the gradient of the output on to x, exactly S times it in sum."""
    module = build(straight_through=straight_through)
    x = torch.randn(2, 8, 10, requires_grad=True)
    cotangent = torch.randn(2, 8, 10)
    quantized, _, _ = module(x)
    quantized.backward(cotangent)
    assert torch.equal(x.grad, multiplicity * cotangent)


def test_phi_learns_from_the_loss_alone():
    module = build()
    quantized, _, loss = module(torch.randn(2, 8, 10, requires_grad=True))
    quantized.sum().backward(retain_graph=True)
    assert all(phi.weight.grad is None or not phi.weight.grad.any() for phi in module.phi)
    loss.backward()
    assert all(phi.weight.grad.any() for phi in module.phi)


# --------------------------------------------------------------------------------------------------------
# codebooks


def test_evaluation_changes_nothing():
    module = build(dead_code_threshold=2.0).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        quantized, codes, _ = module(torch.randn(2, 8, 10))
        decoded = module.decode(codes)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    torch.testing.assert_close(quantized, decoded)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_moving_averages(shared, masked):
    """Hits and sums, row by row; E = average sum / smoothed average hits."""
    module = build(shared_codebook=shared, decay=0.9).train()
    x, mask = torch.randn(3, 8, 10), None
    if masked:
        mask = torch.arange(10) < torch.tensor([10, 4, 0])[:, None]
    old = {name: value.double().clone() for name, value in module.named_buffers()}
    with torch.no_grad():
        _, codes, _ = module(x, mask=mask)

    # Walk the scales again, in float64 and along the same codes, with the codebooks as they were.
    module64 = build(shared_codebook=shared).double()
    module64.load_state_dict(module.state_dict())
    module64.codebooks.copy_(old["codebooks"])
    hits, sums = torch.zeros_like(old["cluster_size"]), torch.zeros_like(old["embed_avg"])
    x = x.double() if mask is None else x.double() * mask[:, None]
    residual = x
    f_hat = torch.zeros_like(x)
    with torch.no_grad(), use_backend("reference"):
        for s, (n, part) in enumerate(
            zip(SCHEDULE.lengths, codes.split(list(SCHEDULE.lengths), dim=1), strict=False)
        ):
            rows = area_down(residual.mT, n, mask)
            for code, row in zip(part.flatten().tolist(), rows.flatten(0, 1), strict=False):
                if code >= 0:
                    hits[0 if shared else s, code] += 1
                    sums[0 if shared else s, code] += row
            f_hat = module64.step(s, f_hat.mT, part)[0].mT
            residual = x - f_hat if mask is None else (x - f_hat) * mask[:, None]
    cluster_size = 0.9 * old["cluster_size"] + 0.1 * hits
    embed_avg = 0.9 * old["embed_avg"] + 0.1 * sums
    total = cluster_size.sum(dim=1, keepdim=True)
    smoothed = (cluster_size + 1e-5) / (total + 16 * 1e-5) * total
    torch.testing.assert_close(module.cluster_size.double(), cluster_size, rtol=1e-6, atol=0)
    for ours, exact in ((module.embed_avg, embed_avg), (module.codebooks, embed_avg / smoothed[..., None])):
        assert (ours - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_dead_code_becomes_a_row_of_the_batch_and_is_used():
    module = build(dead_code_threshold=1.0).train()
    module.codebooks[:, 5] = 100.0  # nearest to nothing
    module.embed_avg[:, 5], module.cluster_size[:, 5] = 100.0, 0.0
    module.cluster_size[:, [k for k in range(16) if k != 5]] = 1000.0  # the others are as alive as can be
    module.embed_avg.copy_(module.codebooks * module.cluster_size[..., None])
    x = torch.randn(4, 8, 10)
    with torch.no_grad():
        kept = module.codebooks.clone()
        _, codes, _ = module(x)
        after, module.codebooks = module.codebooks, kept
        rows = searched_rows(module, x, codes)
        module.codebooks = after
    assert not (codes == 5).any()
    for s, candidates in enumerate(rows):
        distance = (candidates - after[s, 5]).norm(dim=1).min()
        assert distance <= 1e-4 * candidates.norm(dim=1).max()  # Laplace smoothing moves it by 1e-5
    assert (module.encode(x)[:, 0] == 5).any()


@pytest.mark.parametrize("padding", ["mask", "nan"])
def test_a_dead_code_is_never_replaced_by_padding(padding):
    """Samples that fall on padding, or on an item with a NaN, replace nothing: a code of zeros would be of no
    use."""
    module = build(dead_code_threshold=1.0).train()
    module.cluster_size.zero_()
    x, mask = torch.randn(6, 8, 10) + 5, None
    if padding == "mask":
        mask = torch.zeros(6, 10, dtype=torch.bool)
        mask[0] = True
    else:
        x[1:, 0, 0] = torch.nan
    with torch.no_grad():
        module(x, mask=mask)
    assert module.codebooks.isfinite().all()
    assert (module.codebooks.norm(dim=-1) > 1e-3).all()


def test_nan_items_leave_no_trace_in_the_averages():
    module, alone = build().train(), build().train()
    alone.load_state_dict(module.state_dict())
    x = torch.randn(3, 8, 10)
    poisoned = torch.cat([x, torch.full((1, 8, 10), torch.nan), torch.full((1, 8, 10), torch.inf)])
    with torch.no_grad():
        quantized, codes, loss = module(poisoned)
        expected, codes_alone, _ = alone(x)
    assert torch.equal(codes[:3], codes_alone)
    assert torch.equal(quantized[:3], expected)
    assert (codes[3:] == -1).all()
    assert not loss.isfinite()  # training must notice
    for name in ("codebooks", "embed_avg", "cluster_size"):
        torch.testing.assert_close(module.get_buffer(name), alone.get_buffer(name))


def test_an_empty_batch_trains_nothing_and_breaks_nothing():
    module = build(dead_code_threshold=2.0, kmeans_init=True).train()
    quantized, codes, loss = module(torch.randn(0, 8, 10))
    assert quantized.shape == (0, 8, 10)
    assert codes.shape == (0, SCHEDULE.total)
    assert loss == 0
    assert module.codebooks.isfinite().all()
    assert not module.initialized  # the first batch with frames in it does that


# -----------------------------------------------------------------------------------------------------------
# k-means


def test_kmeans_initialisation_fits_the_first_batch():
    x = torch.randn(20, 8, 10)
    errors = {}
    for kmeans_init in (False, True):
        torch.manual_seed(1)
        module = build(kmeans_init=kmeans_init, decay=1.0).train()  # a decay of 1 leaves the codebooks alone
        quantized, _, _ = module(x)
        errors[kmeans_init] = (quantized - x).square().mean().item()
        assert module.initialized
    assert errors[True] < 0.8 * errors[False]


def test_kmeans_initialisation_happens_once_and_alike():
    x = torch.randn(20, 8, 10)
    first, second = build(kmeans_init=True, decay=1.0).train(), build(kmeans_init=True, decay=1.0).train()
    second.load_state_dict(first.state_dict())
    torch.manual_seed(7)  # its draws come from a generator of its own
    with torch.no_grad():
        first(x)
        torch.manual_seed(8)
        second(x)
        assert torch.equal(first.codebooks, second.codebooks)
        second(torch.randn(20, 8, 10))
    torch.testing.assert_close(second.codebooks, first.codebooks)
    restored = build(kmeans_init=True, decay=1.0).train()
    restored.load_state_dict(first.state_dict())
    with torch.no_grad():
        restored(torch.randn(20, 8, 10))
    torch.testing.assert_close(restored.codebooks, first.codebooks)


def test_kmeans_initialisation_ignores_padding():
    """Padding of any content, NaN included, gives the codebooks that the frames alone give."""
    frames = torch.randn(20, 8, 10)
    padded = torch.cat([frames, torch.full((20, 8, 10), torch.nan)], dim=0)
    mask = (torch.arange(40) < 20)[:, None].expand(40, 10)
    plain, masked = build(kmeans_init=True).train(), build(kmeans_init=True).train()
    masked.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain(frames)
        masked(padded, mask=mask)
    torch.testing.assert_close(masked.codebooks, plain.codebooks)


def test_kmeans_is_lloyds_algorithm():
    """After it has converged, each mean is the mean of the rows nearest to it."""
    rows = torch.randn(200, 4) + torch.randint(0, 5, (200, 1)) * 10.0
    means, hits = kmeans(rows, 8, iterations=50)
    codes = nearest(rows, means)
    assert torch.equal(torch.bincount(codes, minlength=8), hits.long())
    for k in range(8):
        torch.testing.assert_close(means[k], rows[codes == k].mean(dim=0))


def test_kmeans_with_fewer_rows_than_clusters():
    rows = torch.randn(3, 4)
    means, hits = kmeans(rows, 7, iterations=5)
    assert hits.sum() == 3
    assert ((means[:, None] - rows).norm(dim=2).min(dim=1).values < 1e-6).all()
    module = build(schedule=ScaleSchedule((1, 2)), codebook_size=32, kmeans_init=True).train()
    quantized, _, _ = module(torch.randn(2, 8, 2))
    assert quantized.isfinite().all()
    assert module.codebooks.isfinite().all()


def test_pickle_and_deepcopy(backend):
    """Copies have weights of their own, and a fast backend sees those."""
    with use_backend(backend), torch.no_grad():
        model = MultiScaleResidualQuantizer(8, schedule=ScaleSchedule([1, 3, 6]), codebook_size=16, kmeans_init=False)
        x = torch.randn(2, 8, 6)
        codes = model.eval().encode(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied.encode(x), codes)
            copied.codebooks.neg_()
            assert not torch.equal(copied.encode(x), codes)
            assert torch.equal(model.encode(x), codes)


def test_frozen_codebooks_code_alike_and_never_learn():
    module, frozen = build(), build(frozen=True)
    averages = {"embed_avg", "cluster_size"}
    assert set(module.state_dict()) - set(frozen.state_dict()) == averages
    frozen.load_state_dict({name: value for name, value in module.state_dict().items() if name not in averages})
    x = torch.randn(2, 8, 10)
    assert torch.equal(frozen.encode(x), module.encode(x))
    assert torch.equal(frozen.eval()(x)[1], module.eval()(x)[1])
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.train()(x)
