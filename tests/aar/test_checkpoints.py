import ast
import re
from pathlib import Path

import pytest
import torch

import aar_kernels as ak
from aar import SAT, SATConfig
from aar.checkpoints import CheckpointError, aar_from_published, quantizer_from_published, sat_from_published
from aar.checkpoints.transformer import published_name

REFERENCE = Path(__file__).parent.parent / "golden" / "reference"
PUBLISHED = ak.ScaleSchedule.quadratic(16, 75)


def state_of(name: str, fill=lambda shape: torch.zeros(()).expand(shape)) -> dict[str, torch.Tensor]:
    """A checkpoint of the names and shapes of a published one; zeros that take no memory unless filled."""
    state = {}
    for line in (REFERENCE / f"{name}.keys").read_text().splitlines():
        key, shape = re.fullmatch(r"(\S+) (\(.*\)) torch\.\w+", line).groups()
        state[key] = fill(ast.literal_eval(shape))
    return state


def small_quantizer(scales: int = 4, dim: int = 10, latent: int = 6, size: int = 7, kernels=(3, 5)) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for s in range(scales):
        book = f"quantizer.vq.layers.{s}._codebook."
        state[f"{book}inited"] = torch.ones(1)
        state[f"{book}cluster_size"] = torch.rand(size, generator=generator) + 1
        state[f"{book}embed"] = torch.randn(size, latent, generator=generator)
        state[f"{book}embed_avg"] = torch.randn(size, latent, generator=generator)
    for k, kernel in enumerate(kernels):
        phi = f"quantizer.vq.quant_resi.qresi_ls.{k}."
        state[f"{phi}weight"] = torch.randn(latent, latent, kernel, generator=generator)
        state[f"{phi}bias"] = torch.randn(latent, generator=generator)
    if dim != latent:
        for name, (a, b) in {"in": (latent, dim), "out": (dim, latent)}.items():
            state[f"quantizer.vq.project_{name}.weight"] = torch.randn(a, b, generator=generator)
            state[f"quantizer.vq.project_{name}.bias"] = torch.randn(a, generator=generator)
    return state


def renamed(state: dict, old: str, new: str) -> dict:
    return {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "millions", "dim", "latent"), [("sat_1024_64", 21.6, 1024, 64), ("sat_128_128", 15.7, 128, 128)]
)
def test_published_checkpoints(name, millions, dim, latent):
    generator = torch.Generator().manual_seed(0)
    state = state_of(name, lambda shape: torch.rand(shape, generator=generator))
    wrapped = {"generator_state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    model = sat_from_published(wrapped, PUBLISHED)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert (model.config.dim, model.config.latent_dim, model.config.n_filters) == (dim, latent, 32)
    assert (model.config.ratios, model.config.lstm_layers) == ((8, 5, 4, 2), 2)
    assert not model.training
    held = model.state_dict()
    for key, value in state.items():
        scale = re.fullmatch(r"quantizer\.vq\.layers\.(\d+)\._codebook\.(\w+)", key)
        if scale and scale[2] == "inited":
            assert held["quantizer.initialized"]
        elif scale:
            own = {"embed": "codebooks"}.get(scale[2], scale[2])
            assert torch.equal(held[f"quantizer.{own}"][int(scale[1])], value)
        else:
            own = key.replace("quantizer.vq.quant_resi.qresi_ls", "quantizer.phi").replace(".vq.", ".")
            own = own.replace("weight_g", "parametrizations.weight.original0")
            assert torch.equal(held[own.replace("weight_v", "parametrizations.weight.original1")], value), key


def transformer_and_its_tokenizer() -> tuple[dict, SAT]:
    """The published AAR's names and shapes; `position` tells tokens apart."""
    with torch.device("meta"):
        tokenizer = SAT(SATConfig(latent_dim=128, dim=128, n_filters=2, lstm_layers=1))
    state = state_of("aar_d16")
    state["lvl_1L"] = PUBLISHED.scale_of_token()[None]
    return state, tokenizer.to_empty(device="cpu")


def test_published_transformer():
    state, tokenizer = transformer_and_its_tokenizer()
    state["pos_1LC"] = torch.randn(1, 455, 1024)
    state["blocks.7.attn.scale_mul_1H11"] = torch.randn(1, 16, 1, 1)
    wrapped = {"model_state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    model = aar_from_published(wrapped, tokenizer)
    sizes = model.config.depth, model.config.width, model.config.heads, model.config.condition_dim
    assert sizes == (16, 1024, 16, 512)
    assert torch.equal(model.position, state["pos_1LC"][0])
    assert torch.equal(model.blocks[7].log_scale, state["blocks.7.attn.scale_mul_1H11"].flatten())
    assert torch.equal(model.quantizer.codebooks, tokenizer.quantizer.codebooks)
    ours = {published_name(key) for key in model.state_dict() if not key.startswith("quantizer.")}
    derived = {key for key in state if key.endswith(("zero_k_bias", "lvl_1L", "attn_bias_for_masking"))}
    assert ours == state.keys() - derived


def test_a_transformer_of_another_schedule_or_with_holes():
    state, tokenizer = transformer_and_its_tokenizer()
    with pytest.raises(CheckpointError, match=r"is for scales of \(455,\) tokens, the tokenizer has \(1, 2, 4,"):
        aar_from_published(state | {"lvl_1L": torch.zeros(1, 455)}, tokenizer)
    del state["blocks.3.ffn.fc2.bias"]
    state["blocks.3.extra"] = state["head.bias"]
    state["word_embed.weight"] = torch.zeros(1024, 64)
    with pytest.raises(CheckpointError) as caught:
        aar_from_published(state, tokenizer)
    assert caught.value.missing == ("blocks.3.ffn.fc2.bias",)
    assert caught.value.unexpected == ("blocks.3.extra",)
    assert caught.value.misshaped == {"word_embed.weight": ((1024, 128), (1024, 64))}
    with pytest.raises(CheckpointError, match="is not an AAR checkpoint: class_emb.fc1.weight"):
        aar_from_published(state_of("sat_1024_64"), tokenizer)


def test_the_transformer_is_not_a_tokenizer():
    with pytest.raises(CheckpointError, match="not a SAT checkpoint.*_codebook.embed"):
        sat_from_published(state_of("aar_d16"), PUBLISHED)
    with pytest.raises(CheckpointError, match="not a SAT checkpoint.*model_state_dict"):
        sat_from_published({"model_state_dict": state_of("aar_d16")}, PUBLISHED)


def test_everything_wrong_is_listed_at_once():
    state = state_of("sat_1024_64")
    gone = ["encoder.model.3.conv.conv.weight_g", "quantizer.vq.layers.7._codebook.embed"]
    for key in gone:
        del state[key]
    state["encoder.model.99.bias"] = torch.zeros(3)
    state["quantizer.vq.extra"] = torch.zeros(3)
    state["decoder.model.1.lstm.bias_ih_l1"] = torch.zeros(2047)
    state["quantizer.vq.layers.3._codebook.cluster_size"] = torch.zeros(1023)
    with pytest.raises(CheckpointError) as caught:
        sat_from_published(state, PUBLISHED)
    error = caught.value
    assert sorted(error.missing) == sorted(gone)
    assert sorted(error.unexpected) == ["encoder.model.99.bias", "quantizer.vq.extra"]
    assert error.misshaped == {
        "decoder.model.1.lstm.bias_ih_l1": ((2048,), (2047,)),
        "quantizer.vq.layers.3._codebook.cluster_size": ((1024,), (1023,)),
    }
    for name in (*error.missing, *error.unexpected, *error.misshaped):
        assert name in str(error)
    assert "2 missing" in str(error).splitlines()[0]


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("encoder.model.0.conv.conv.bias", "sizes"),
        ("decoder.model.6.convtr.convtr.weight_v", "sizes"),
        ("quantizer.vq.project_in.weight", "sizes"),
        ("quantizer.vq.layers.0._codebook.embed", "sizes"),
        ("quantizer.vq.project_out.bias", "missing"),
        ("quantizer.vq.quant_resi.qresi_ls.2.weight", "missing"),
        ("decoder.model.1.lstm.weight_hh_l1", "missing"),
        ("decoder.model.15.conv.conv.weight_v", "missing"),
    ],
)
def test_any_missing_tensor_is_named(key, kind):
    state = state_of("sat_1024_64")
    del state[key]
    with pytest.raises(CheckpointError, match=kind) as caught:
        sat_from_published(state, PUBLISHED)
    assert caught.value.missing == (key,)


def test_another_number_of_scales():
    with pytest.raises(CheckpointError, match="has 16 scales but 3 lengths"):
        sat_from_published(state_of("sat_128_128"), [1, 5, 75])


@pytest.mark.parametrize("prefix", ["quantizer.vq.", "vq.", "", "module.quantizer.vq."])
def test_quantizer_alone_under_any_prefix(prefix):
    state = small_quantizer()
    quantizer = quantizer_from_published(renamed(state, "quantizer.vq.", prefix), [1, 2, 4, 8])
    assert (quantizer.dim, quantizer.latent_dim, quantizer.codebook_size) == (10, 6, 7)
    assert torch.equal(quantizer.codebooks[2], state["quantizer.vq.layers.2._codebook.embed"])
    assert torch.equal(quantizer.embed_avg[1], state["quantizer.vq.layers.1._codebook.embed_avg"])
    assert torch.equal(quantizer.project_out.weight, state["quantizer.vq.project_out.weight"])
    assert tuple(quantizer.phi_index) == (0, 0, 1, 1)
    assert [p.weight.shape[2] for p in quantizer.phi] == [3, 5]
    assert quantizer.initialized
    assert not quantizer.training


def test_quantizer_out_of_a_whole_checkpoint():
    quantizer = quantizer_from_published({"generator_state_dict": state_of("sat_1024_64")}, PUBLISHED)
    assert (quantizer.dim, quantizer.latent_dim) == (1024, 64)


def test_without_projection():
    state = small_quantizer(dim=6)
    quantizer = quantizer_from_published(state, [1, 2, 4, 8])
    assert quantizer.dim == quantizer.latent_dim == 6


def test_phi_sharing_is_read_off_the_names():
    shared = renamed(small_quantizer(kernels=(5,)), "qresi_ls.0.", "qresi.")
    quantizer = quantizer_from_published(shared, [1, 2, 4, 8])
    assert len(quantizer.phi) == 1
    assert tuple(quantizer.phi_index) == (0, 0, 0, 0)
    assert torch.equal(quantizer.phi[0].weight, shared["quantizer.vq.quant_resi.qresi.weight"])

    unshared = renamed(small_quantizer(kernels=(1, 3, 5, 7)), "qresi_ls.", "")
    quantizer = quantizer_from_published(unshared, [1, 2, 4, 8])
    assert tuple(quantizer.phi_index) == (0, 1, 2, 3)
    assert torch.equal(quantizer.phi[3].weight, unshared["quantizer.vq.quant_resi.3.weight"])

    quantizer = quantizer_from_published(small_quantizer(kernels=()), [1, 2, 4, 8])
    assert len(quantizer.phi) == 0


def test_a_gap_between_phi_kernels_and_an_even_one_are_reported():
    state = small_quantizer(kernels=(3, 4, 5))
    for part in ("weight", "bias"):
        del state[f"quantizer.vq.quant_resi.qresi_ls.0.{part}"]
    with pytest.raises(CheckpointError) as caught:
        quantizer_from_published(state, [1, 2, 4, 8])
    assert set(caught.value.missing) == {
        f"quantizer.vq.quant_resi.qresi_ls.0.{part}" for part in ("weight", "bias")
    }
    assert list(caught.value.misshaped) == ["quantizer.vq.quant_resi.qresi_ls.1.weight"]


def test_moving_averages_may_be_left_out():
    state = small_quantizer()
    whole = quantizer_from_published(state, [1, 2, 4, 8])
    del state["quantizer.vq.layers.1._codebook.embed_avg"]
    quantizer = quantizer_from_published(state, [1, 2, 4, 8])
    assert torch.equal(quantizer.embed_avg[[0, 2, 3]], whole.embed_avg[[0, 2, 3]])
    torch.testing.assert_close(
        quantizer.embed_avg[1] / quantizer.cluster_size[1][:, None], quantizer.codebooks[1]
    )


def test_a_codebook_that_was_never_filled():
    state = small_quantizer()
    state["quantizer.vq.layers.1._codebook.inited"] = torch.zeros(1)
    assert not quantizer_from_published(state, [1, 2, 4, 8]).initialized


class Surprise:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a checkpoint ran')",)


@pytest.mark.parametrize("content", ["text", "empty", "code", "cut", "list"])
def test_files_that_are_no_checkpoint(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(
        {"code": {"generator_state_dict": Surprise()}, "list": [1]}.get(content, small_quantizer()), path
    )
    if content == "text":
        path.write_text("not a checkpoint\n")
    elif content == "empty":
        path.write_bytes(b"")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        sat_from_published(path, PUBLISHED)
