"""The paper's public reference code, run on seeded random weights: `tests/golden/SOURCE.md`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import error64
from torch import Tensor

from aar_kernels import ScaleSchedule, use_backend
from aar_kernels.nn import MultiScaleResidualQuantizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["k1", "k4", "k5"])
def golden(request) -> dict:
    """k1 has projections and one phi for all scales, k4 a tick layout of its own, k5 five widths of phi."""
    return torch.load(GOLDEN / f"msrq_tiny_{request.param}.pt", weights_only=True)


@pytest.fixture
def quantizer(golden, backend) -> MultiScaleResidualQuantizer:
    """The golden weights, running on one backend."""
    config, state = golden["config"], golden["state_dict"]
    module = MultiScaleResidualQuantizer(
        config["dimension"], latent_dim=config["latent_dim"], schedule=ScaleSchedule(config["scales"]),
        codebook_size=config["bins"], phi_kernel_sizes=config["phi_kernel"], kmeans_init=False,
        dead_code_threshold=0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(state[published_name(name)])
        for s in range(len(config["scales"])):
            module.codebooks[s] = state[f"vq.layers.{s}._codebook.embed"]
            module.cluster_size[s] = state[f"vq.layers.{s}._codebook.cluster_size"]
        module.embed_avg.copy_(
            module.codebooks * module.cluster_size[..., None]
        )  # as the golden run was set up
    with use_backend(backend):
        yield module.eval()


def published_name(name: str) -> str:
    return "vq." + name.replace("phi.", "quant_resi.qresi_ls.")


def assert_equal_to_rounding(ours: Tensor, published: Tensor, golden: dict) -> None:
    """Both sides sum ``terms`` products per number in float32, in an order of their own; roundings add like a
    random walk."""
    config = golden["config"]
    terms = len(config["scales"]) * config["latent_dim"] * max(config["phi_kernel"]) + config["dimension"]
    bound = torch.finfo(torch.float32).eps * math.sqrt(terms) * published.abs().max().item()
    assert error64(ours, published) <= bound


@torch.no_grad()
def test_encode(golden, quantizer):
    short, long = golden["infer"]
    assert long["x"].shape[2] > quantizer.schedule.length  # every scale pools and interpolates
    for item in (short, long):
        assert torch.equal(quantizer.encode(item["x"]), torch.cat(item["codes"], dim=1))


@torch.no_grad()
def test_decode(golden, quantizer):
    item = golden["infer"][0]
    codes = torch.cat(item["codes"], dim=1)
    assert_equal_to_rounding(quantizer.decode(codes), item["decode"], golden)
    assert_equal_to_rounding(quantizer.decode_scales(codes), torch.stack(item["decode_each_scale"]), golden)


@torch.no_grad()
def test_next_scale_inputs(golden, quantizer):
    item = golden["infer"][0]
    ours = quantizer.next_scale_inputs(torch.cat(item["codes"], dim=1))
    assert_equal_to_rounding(ours, torch.cat(item["idx_to_var_input"], dim=1), golden)


@torch.no_grad()
def test_step(golden, quantizer):
    item = golden["infer"][0]
    batch, length = len(item["x"]), quantizer.schedule.length
    f_hat = torch.zeros(batch, length, quantizer.latent_dim)
    for s, codes in enumerate(item["codes"]):
        f_hat, following = quantizer.step(s, f_hat, codes)
        assert_equal_to_rounding(f_hat.mT, item["f_hat"][s], golden)
        if s + 1 < len(item["codes"]):
            assert_equal_to_rounding(following.mT, item["next_ar_input"][s], golden)
    assert_equal_to_rounding(quantizer.latent_to_sequence(f_hat), item["decode"], golden)


def test_training_step(golden, quantizer):
    (item,) = golden["train"]
    quantizer.train()
    x = item["x"].clone().requires_grad_()
    quantized, codes, loss = quantizer(x)
    ((quantized * item["cotangent"]).mean() + loss).backward()

    assert torch.equal(codes, torch.cat(item["codes"], dim=1))
    assert_equal_to_rounding(quantized, item["output"], golden)
    assert_equal_to_rounding(loss, item["losses"].mean(), golden)
    assert_equal_to_rounding(x.grad, item["grad_x"], golden)
    for name, parameter in quantizer.named_parameters():
        assert_equal_to_rounding(parameter.grad, item["grads"][published_name(name)], golden)
    buffers = {"embed": "codebooks", "embed_avg": "embed_avg", "cluster_size": "cluster_size"}
    for name, after in item["buffers_after"].items():
        _, _, scale, _, buffer = name.split(".")
        assert_equal_to_rounding(quantizer.get_buffer(buffers[buffer])[int(scale)], after, golden)
