"""Two processes hold the codebooks that one process has after the joint batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from aar_kernels import ScaleSchedule, use_backend
from aar_kernels.nn import MultiScaleResidualQuantizer

STEPS = 3
BUFFERS = ("codebooks", "embed_avg", "cluster_size")


def train(batches: list[torch.Tensor], backend: str, **options) -> list[dict[str, torch.Tensor]]:
    """The buffers after k-means initialisation on the first batch, and after each step."""
    torch.manual_seed(0)
    module = MultiScaleResidualQuantizer(
        8, schedule=ScaleSchedule((1, 3, 6)), codebook_size=12, phi_kernel_sizes=(3,), decay=0.8, **options
    ).train()
    torch.manual_seed(
        100 + (dist.get_rank() if dist.is_initialized() else 0)
    )  # processes draw samples of their own
    history = []
    with torch.no_grad(), use_backend(backend):
        module._initialize(batches[0], None)
        for batch in [None, *batches]:
            if batch is not None:
                module(batch)
            history.append({name: module.get_buffer(name).clone() for name in BUFFERS})
    return history


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 8, 6, generator=generator) for _ in range(STEPS)]


def worker(rank: int, directory: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    share = [batch.chunk(2)[rank] for batch in batches()]
    results = {threshold: train(share, backend, dead_code_threshold=threshold) for threshold in (0.0, 3.0)}
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def two_processes(backend, tmp_path) -> list[dict]:
    mp.spawn(worker, (str(tmp_path), backend), nprocs=2)
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]


def test_two_processes_are_one(two_processes, backend):
    for threshold, first in two_processes[0].items():
        for ours, theirs in zip(first, two_processes[1][threshold], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in BUFFERS)
    alone = train(batches(), backend, dead_code_threshold=0.0)
    together = two_processes[0][0.0]
    assert all(
        torch.equal(alone[0][name], together[0][name]) for name in BUFFERS
    )  # k-means sees the joint batch
    for expected, ours in zip(alone, together, strict=True):
        for name in BUFFERS:
            torch.testing.assert_close(ours[name], expected[name])
    # Dead codes were replaced, by rows of both processes' batches.
    replaced = two_processes[0][3.0]
    assert not torch.allclose(replaced[1]["codebooks"], together[1]["codebooks"])
    fresh = replaced[1]["codebooks"][0][replaced[1]["cluster_size"][0] == 3.0]
    pooled = batches()[0].mean(dim=2)
    nearest = [(half[None] - fresh[:, None]).norm(dim=2).min(dim=1).values < 1e-3 for half in pooled.chunk(2)]
    assert (nearest[0] | nearest[1]).all()
    assert nearest[0].any()
    assert nearest[1].any()
