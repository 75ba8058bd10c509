"""`aar sample` and the conditions it makes, with a CLAP of random weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile
import torch
from small import TINY, files_under, noise, tiny_sat

from aar import AAR, AARConfig, cli
from aar.audio import read_audio
from aar.conditions import AcousticEmbedding, Clap, ConditionError

DIM = 12
QUANTIZER = "lengths", "codebook_size", "latent_dim", "phi_kernel_sizes"
CONFIG = AARConfig(
    depth=1, width=32, heads=1, condition_dim=DIM, **{name: getattr(TINY, name) for name in QUANTIZER}
)


@pytest.fixture(scope="module")
def clap_dir(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    text = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 40, "projection_dim": DIM,
    }  # fmt: skip
    audio = {
        "spec_size": 256, "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1],
        "num_attention_heads": [1, 2], "window_size": 4, "projection_dim": DIM,
    }  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=DIM)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "rain", "on", "a", "roof", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path_factory.mktemp("clap")
    for part in (
        transformers.ClapModel(config),
        transformers.ClapFeatureExtractor(truncation="rand_trunc"),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=30
        ),
    ):
        part.save_pretrained(directory)
    return directory


@pytest.fixture
def clap(clap_dir):
    return Clap.from_pretrained(clap_dir)


@pytest.fixture(scope="module")
def aar_dir(model, tmp_path_factory):
    torch.manual_seed(1)
    transformer, directory = AAR(CONFIG), tmp_path_factory.mktemp("aar")
    torch.nn.init.normal_(transformer.head.weight)
    transformer.set_quantizer(model.quantizer).save_pretrained(directory)
    return directory


@pytest.fixture
def sample(capsys, aar_dir, model_dir, clap_dir):
    """Runs `aar sample ARGS` with the models; returns the exit code and the errors on stderr."""

    def run(*args, transformer=aar_dir, tokenizer=model_dir, clap=clap_dir):
        models = "--model", transformer, "--tokenizer", tokenizer, "--clap", clap, "--device", "cpu"
        code = cli.main(["sample", *map(str, (*args, *models))])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("aar:")]

    return run


# ------------------------------------------------------------------------------------------------------
# conditions


def test_embeddings_are_unit_vectors_that_tell_inputs_apart(clap):
    waves = [torch.sin(torch.arange(48000) * f) for f in (0.01, 0.2)]
    for embeddings in (clap.embed_audio(waves, 48000), clap.embed_text(["rain on a roof", "a dog"])):
        assert embeddings.shape == (2, DIM)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
        assert not torch.allclose(embeddings[0], embeddings[1])


def test_an_embedding_does_not_vary(clap):
    """Though `transformers` crops long clips at random."""
    wave = torch.randn(24000 * 12, generator=torch.Generator().manual_seed(0))
    first, second = clap.embed_audio([wave], 24000), clap.embed_audio([wave], 24000)
    assert torch.equal(first, second)


def test_older_transformers_return_the_embedding_itself(clap, monkeypatch):
    expected = clap.embed_text(["rain"])
    newer = clap.model.get_text_features
    monkeypatch.setattr(clap.model, "get_text_features", lambda **inputs: newer(**inputs).pooler_output)
    assert torch.equal(clap.embed_text(["rain"]), expected)


def test_no_such_clap(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConditionError, match="no CLAP model"):
        Clap.from_pretrained(tmp_path)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConditionError, match=r"aar-kernels\[clap\]"):
        Clap.from_pretrained()


# ------------------------------------------------------------------------------------------------------
# the command


def test_sounds_of_a_seed(sample, tmp_path):
    options = "--unconditional", "--num", 3, "--seconds", 0.5
    assert sample(tmp_path / "a", *options) == (0, [])
    assert sample(tmp_path / "b", *options, "--seed", 0) == (0, [])
    assert sample(tmp_path / "c", *options, "--seed", 1) == (0, [])
    assert files_under(tmp_path / "a") == ["000.wav", "001.wav", "002.wav"]
    a, b, c = ([read_audio(tmp_path / run / f"{i:03d}.wav") for i in range(3)] for run in "abc")
    for i in range(3):
        assert len(a[i]) == 12000
        assert torch.equal(a[i], b[i])
    assert torch.equal(a[1], c[0])
    assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("kind", ["text", "cond"])
def test_the_condition_matters(sample, recording, tmp_path, kind):
    others = ("rain on", "a dog")
    if kind == "cond":
        others = recording("chord.wav"), tmp_path / "noise.wav"
        soundfile.write(others[1], noise(24000).numpy(), 24000)
    waves = []
    for i, value in enumerate(others):
        assert sample(tmp_path / str(i), f"--{kind}", value, "--cfg", 8) == (0, [])
        waves.append(read_audio(tmp_path / str(i) / "000.wav"))
    assert not torch.equal(*waves)


def test_a_model_of_acoustics(sample, recording, model, tmp_path):
    torch.manual_seed(2)
    transformer = AAR(replace(CONFIG, condition_dim=AcousticEmbedding.dim))
    torch.nn.init.normal_(transformer.head.weight)
    transformer.set_quantizer(model.quantizer).save_pretrained(tmp_path / "aar")
    soundfile.write(tmp_path / "noise.wav", noise(24000).numpy(), 24000)
    waves = []
    for i, source in enumerate((recording("chord.wav"), tmp_path / "noise.wav")):
        assert sample(tmp_path / str(i), "--cond", source, "--cfg", 8, transformer=tmp_path / "aar") == (0, [])
        waves.append(read_audio(tmp_path / str(i) / "000.wav"))
    assert not torch.equal(*waves)
    code, lines = sample(tmp_path / "out", "--text", "rain", transformer=tmp_path / "aar")
    assert code == 2
    assert "--cond" in lines[0]


@pytest.mark.parametrize("seconds", [1, 2.5])
def test_long_sounds_are_windows(sample, tmp_path, seconds):
    assert sample(tmp_path, "--unconditional", "--seconds", seconds, "--dtype", "int8") == (0, [])
    assert soundfile.info(tmp_path / "000.wav").frames == seconds * 24000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--unconditional", "--cfg", -1), "cfg must be at least 0"),
        (("--unconditional", "--top-p", 0), "top_p"),
        (("--unconditional", "--num", 0), "must be positive"),
        (("--unconditional", "--seconds", 0), "must be positive"),
        (("--cond", "nothing.wav"), "nothing.wav"),
    ],
)
def test_one_line_says_what_is_wrong(sample, tmp_path, options, message):
    code, lines = sample(tmp_path / "out", *options)
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(sample, tmp_path, recording):
    other = replace(TINY, lengths=(1, 5, 75))
    tiny_sat(config=other).save_pretrained(tmp_path / "sat")
    AAR(replace(CONFIG, condition_dim=5)).save_pretrained(tmp_path / "aar")
    target = tmp_path / "out"
    for given, options, message in (
        ({"tokenizer": tmp_path / "sat"}, ("--unconditional",), "does not fit"),
        ({"transformer": tmp_path / "aar"}, ("--text", "rain"), "5 numbers"),
        ({"transformer": tmp_path / "none"}, ("--unconditional",), "none"),
        ({"clap": tmp_path / "none"}, ("--text", "rain"), "no CLAP model"),
    ):
        code, lines = sample(target, *options, **given)
        assert (code, len(lines)) == (2, 1), lines
        assert message in lines[0]
    assert not target.exists()
    assert sample(recording("file.wav"), "--unconditional")[0] == 2


def test_a_condition_is_needed(aar_dir, model_dir, tmp_path):
    command = [sys.executable, "-m", "aar", "sample", tmp_path, "--model", aar_dir, "--tokenizer", model_dir]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "one of the arguments --cond --text --unconditional is required" in done.stderr
