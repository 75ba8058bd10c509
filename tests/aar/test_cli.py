import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from small import TINY, files_under, tiny_sat

from aar import cli
from aar.audio import load_tokens, read_audio, save_tokens


@pytest.fixture
def aar(capsys, model_dir):
    """Runs `aar ARGS --model MODEL`; returns the exit code and stderr's lines."""

    def run(*args, model=model_dir):
        code = cli.main([*map(str, args), "--model", str(model), "--device", "cpu"])
        return code, capsys.readouterr().err.splitlines()

    return run


def assert_one_error(result, *parts):
    code, lines = result
    assert (code, len(lines)) == (2, 1), result
    assert lines[0].startswith("aar: ")
    for part in map(str, parts):
        assert part in lines[0]


@pytest.mark.parametrize("overlap", ["0", "0.1"])
def test_encode_then_decode_is_reconstruct(aar, recording, tmp_path, model, overlap):
    source = recording(seconds=2.5, rate=44100, channels=2)
    assert aar("encode", source, tmp_path / "a.aart", "--overlap", overlap) == (0, [])
    assert aar("decode", tmp_path / "a.aart", tmp_path / "a.wav") == (0, [])
    assert aar("reconstruct", source, tmp_path / "b.wav", "--overlap", overlap) == (0, [])
    tokens = load_tokens(tmp_path / "a.aart")
    assert (tokens.num_samples, tokens.overlap, tokens.lengths) == (60000, float(overlap), TINY.lengths)
    assert tokens.model == model.fingerprint()
    expected = model.reconstruct(read_audio(source)[None, None], float(overlap))[0, 0].clamp(-1, 1)
    for name in ("a.wav", "b.wav"):
        torch.testing.assert_close(read_audio(tmp_path / name), expected, rtol=0, atol=1.5 / 2**15)


def test_scales_give_one_file_each(aar, recording, tmp_path, model):
    source = recording()
    assert aar("reconstruct", source, tmp_path / "out" / "a.flac", "--scales", "1,4") == (0, [])
    assert files_under(tmp_path / "out") == ["a.scales01.flac", "a.scales04.flac"]
    expected = model.reconstruct_scales(read_audio(source)[None, None], [1, 4])[:, 0, 0].clamp(-1, 1)
    for name, wave in zip(files_under(tmp_path / "out"), expected, strict=True):
        torch.testing.assert_close(read_audio(tmp_path / "out" / name), wave, rtol=0, atol=1.5 / 2**15)
    assert_one_error(
        aar("reconstruct", source, tmp_path / "b.wav", "--scales", "1,5"), "--scales 5", "4 scales"
    )


def test_trees_are_mirrored(aar, recording, tmp_path):
    for name in ("in/a.wav", "in/deep/b.flac", "in/deep/C.OGG"):
        recording(name, seconds=0.1)
    (tmp_path / "in/notes.txt").write_text("ignored")
    assert aar("encode", tmp_path / "in", tmp_path / "tokens") == (0, [])
    assert files_under(tmp_path / "tokens") == ["a.aart", "deep/C.aart", "deep/b.aart"]
    assert aar("decode", tmp_path / "tokens", tmp_path / "out") == (0, [])
    assert files_under(tmp_path / "out") == ["a.wav", "deep/C.wav", "deep/b.wav"]
    assert aar("reconstruct", tmp_path / "in", tmp_path / "heard") == (0, [])
    assert files_under(tmp_path / "heard") == ["a.wav", "deep/C.OGG", "deep/b.flac"]


def test_one_bad_file_does_not_stop_a_tree(aar, recording, tmp_path):
    recording("in/a.wav", seconds=0.1)
    recording("in/c.wav", seconds=0.1)
    (tmp_path / "in/b.wav").write_text("no audio")
    assert_one_error(aar("encode", tmp_path / "in", tmp_path / "out"), tmp_path / "in/b.wav", "not audio")
    assert files_under(tmp_path / "out") == ["a.aart", "c.aart"]


def test_a_file_into_a_directory_keeps_its_name(aar, recording, tmp_path):
    (tmp_path / "out").mkdir()
    assert aar("encode", recording(), tmp_path / "out") == (0, [])
    assert files_under(tmp_path / "out") == ["in.aart"]


def test_inputs_that_cannot_be_used(aar, tmp_path):
    out = tmp_path / "out.wav"
    assert_one_error(aar("reconstruct", tmp_path / "absent.wav", out), "absent.wav", "no such file")
    (tmp_path / "text.wav").write_text("no audio")
    assert_one_error(aar("reconstruct", tmp_path / "text.wav", out), "text.wav", "not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24000)
    assert_one_error(aar("encode", tmp_path / "empty.wav", out), "empty.wav", "empty")
    soundfile.write(tmp_path / "nan.wav", np.array([np.nan]), 24000, subtype="FLOAT")
    assert_one_error(aar("encode", tmp_path / "nan.wav", out), "nan.wav", "NaN")
    assert_one_error(aar("decode", tmp_path / "text.wav", out), "text.wav", "not a token file", "aar encode")
    (tmp_path / "folder").mkdir()
    assert_one_error(aar("encode", tmp_path / "folder", out), "folder", "no file that ends in .wav")
    assert not out.exists()


def test_outputs_that_cannot_be_made(aar, recording, tmp_path):
    source = recording("in/a.wav")
    recording("in/a.flac")
    assert_one_error(aar("reconstruct", source, tmp_path / "out.xyz"), "out.xyz", ".flac")
    assert_one_error(aar("reconstruct", source, source), "overwrite the input")
    assert_one_error(aar("reconstruct", tmp_path / "in", tmp_path / "in"), "overwrite the input")
    assert_one_error(aar("encode", tmp_path / "in", tmp_path / "out"), "both become", "a.aart")
    (tmp_path / "file").write_text("")
    assert_one_error(aar("encode", tmp_path / "in", tmp_path / "file"), "is a file")
    assert_one_error(aar("encode", source, tmp_path / "file" / "a.aart"), "file")
    assert files_under(tmp_path) == ["file", "in/a.flac", "in/a.wav"]


def test_models_that_cannot_be_used(aar, recording, tmp_path, capsys, model_dir):
    source, out = recording(), tmp_path / "out.aart"
    assert_one_error(aar("encode", source, out, model=tmp_path / "absent.pth"), "absent.pth", "No such file")
    (tmp_path / "text.pth").write_text("no checkpoint")
    assert_one_error(
        aar("encode", source, out, model=tmp_path / "text.pth"), "text.pth", "no PyTorch checkpoint"
    )
    torch.save({"model_state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    assert_one_error(aar("encode", source, out, model=tmp_path / "other.pth"), "not a SAT checkpoint")
    (tmp_path / "folder").mkdir()
    assert_one_error(aar("encode", source, out, model=tmp_path / "folder"), "folder", "config.json")
    assert_one_error(aar("encode", source, out, "--overlap", "0.7"), "half a window")
    assert_one_error(aar("encode", source, out, "--overlap", "inf"), "overlap")
    assert cli.main(["encode", str(source), str(out), "--model", str(model_dir), "--device", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not out.exists()


def test_tokens_that_do_not_belong(aar, recording, tmp_path):
    path, out = tmp_path / "a.aart", tmp_path / "out.wav"
    aar("encode", recording(), path)
    tiny_sat(1).save_pretrained(tmp_path / "other")
    assert_one_error(aar("decode", path, out, model=tmp_path / "other"), "a.aart", "another model")
    tokens, content = load_tokens(path), path.read_bytes()
    path.write_bytes(content[:-10])
    assert_one_error(aar("decode", path, out), "a.aart", "truncated", "encode the recording again")
    save_tokens(path, replace(tokens, num_samples=99999))
    assert_one_error(aar("decode", path, out), "a.aart", "does not fit")
    save_tokens(path, replace(tokens, codebook_size=1000))
    assert_one_error(aar("decode", path, out), "a.aart", "another model")
    assert not out.exists()


@pytest.mark.parametrize(("command", "name"), [("encode", "a.aart"), ("reconstruct", "a.wav")])
def test_nothing_is_left_half_written(aar, recording, tmp_path, monkeypatch, command, name):
    """The disk fills up in the last step, once the new file has been written beside."""
    source = recording()
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"before")

    def full(beside, target):
        assert beside.exists()
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("aar.atomic.os.replace", full)
    assert_one_error(aar(command, source, out / name), name, "No space left")
    assert files_under(out) == [name]
    assert (out / name).read_bytes() == b"before"


def test_interrupting_leaves_nothing(recording, tmp_path, model_dir, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("aar.audio.tokens.zlib.crc32", interrupted)
    assert (
        cli.main(["encode", str(recording()), str(tmp_path / "out/a.aart"), "--model", str(model_dir)]) == 130
    )
    assert files_under(tmp_path / "out") == []


def test_info(capsys, recording, tmp_path, model_dir, model):
    def info(*args) -> str:
        assert cli.main(["info", *map(str, args)]) == 0
        return capsys.readouterr().out

    assert torch.__version__ in info()
    text = info(model_dir)
    assert "106 a second, of 20 codes" in text
    assert model.fingerprint() in text
    source = recording(seconds=0.5, rate=44100, channels=2)
    text = info(source)
    assert "44100 Hz" in text
    assert "0.500 s" in text
    assert "channels      2" in text
    cli.main(["encode", str(source), str(tmp_path / "a.aart"), "--model", str(model_dir)])
    text = info(tmp_path / "a.aart")
    assert "106 in 1 windows" in text
    assert model.fingerprint() in text
    assert cli.main(["info", str(tmp_path / "absent")]) == 2


def test_info_lists_all_that_a_checkpoint_lacks(capsys, tmp_path):
    model_dir = tmp_path / "model"
    tiny_sat().save_pretrained(model_dir)
    wider = tiny_sat(config=replace(TINY, n_filters=4))
    wider.save_pretrained(tmp_path / "wider")
    shutil.copy(tmp_path / "wider/model.safetensors", model_dir / "model.safetensors")
    assert cli.main(["info", str(model_dir)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 50
    assert all("misshaped" in line for line in lines)


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode", "info", "demo"])
def test_help_shows_an_example(capsys, command):
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert f"  aar {command}" in capsys.readouterr().out.split("example")[1]


def test_wrong_usage_exits_with_2(capsys):
    for arguments in ([], ["nothing"], ["encode", "a"], ["reconstruct", "a", "b", "--scales", "1,x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
