"""Finding recordings: every kind of source, and every way for one to be wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from data_files import corpus, shard, signal, write

from aar.data import find_audio, read_recording
from aar.errors import AarError


def names(recordings, root):
    return [(str(r.path.relative_to(root)), r.label) for r in recordings]


def test_folder(tmp_path):
    corpus(tmp_path)
    (tmp_path / "notes.md").write_text("not audio")
    write(tmp_path / "music" / ".hidden.wav", signal(0.1))
    assert names(find_audio(tmp_path), tmp_path) == [
        ("e.wav", ""), ("music/a.wav", "music"), ("music/b.flac", "music"), ("speech/c.ogg", "speech"),
        ("speech/d.wav", "speech"),
    ]  # fmt: skip


def test_links_are_followed_but_not_in_circles(tmp_path):
    corpus(tmp_path / "real")
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path / "real", root / "linked")
    os.symlink(root, tmp_path / "real" / "loop")
    assert {r.label for r in find_audio(root)} == {"linked"}
    assert len(find_audio(root)) == 5


def test_list(tmp_path):
    corpus(tmp_path)
    (tmp_path / "train.txt").write_text(f"# all\nmusic/a.wav\n\n{tmp_path}/speech/d.wav\n")
    found = find_audio(tmp_path / "train.txt")
    assert names(found, tmp_path) == [("music/a.wav", "music"), ("speech/d.wav", "")]


def test_manifest(tmp_path):
    corpus(tmp_path)
    lines = [
        {"path": "music/a.wav", "start": 0.5, "duration": 1.25, "label": "strings", "text": "ignored"},
        {"path": "speech/d.wav"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = find_audio(tmp_path / "train.jsonl")
    assert (first.start, first.duration, first.label) == (0.5, 1.25, "strings")
    assert (second.start, second.duration, second.label) == (0.0, None, "speech")
    whole = read_recording(find_audio(tmp_path / "music" / "a.wav")[0], 24000)
    torch.testing.assert_close(read_recording(first, 24000), whole[12000:42000], rtol=0, atol=0)


@pytest.mark.parametrize(
    "line",
    [
        "not json", "[1, 2]", "{}", '{"path": 5}', '{"path": ""}', '{"path": "a.wav", "start": -1}',
        '{"path": "a.wav", "duration": 0}', '{"path": "a.wav", "duration": NaN}', '{"path": "a.wav", "start": "1"}',
    ],
)  # fmt: skip
def test_bad_manifest_line(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text('{"path": "a.wav"}\n\n' + line + "\n")
    with pytest.raises(AarError, match=r"train\.jsonl:3: ") as caught:
        find_audio(path)
    assert len(str(caught.value).splitlines()) == 1


def test_audioset(tmp_path):
    for name in ("audioset_unbalanced_train_mp3/--aE2O5G5WE.mp3", "audioset_unbalanced_train_mp3/Y--PJHxphWEs.mp3",
                 "audioset_eval_raw_mp3/--4gqARaEJE.mp3"):  # fmt: skip
        write(tmp_path / name, signal(1.0))
    (tmp_path / "unbalanced_train_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '---1_cCGK4M, 0.000, 10.000, "/m/01g50p,/m/0284vy3"\n'
        '--aE2O5G5WE, 0.000, 10.000, "/m/03fwl,/m/04rlf,/m/09x0r"\n'
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n'
    )
    found = find_audio(tmp_path)
    assert [(r.path.stem, r.start, r.duration, r.label) for r in found] == [
        ("--aE2O5G5WE", 0.0, 10.0, "/m/03fwl,/m/04rlf,/m/09x0r"),
        ("Y--PJHxphWEs", 0.0, 10.0, "/m/09x0r,/t/dd00088"),
    ]
    assert find_audio(tmp_path / "unbalanced_train_segments.csv") == found
    # The table promised ten seconds, the file holds one.
    assert 24000 <= len(read_recording(found[0], 24000)) < 30000


@pytest.mark.parametrize("row", ["a, 0.0, 10.0", 'a, zero, 10.0, "/m/1"', 'a, 10.0, 10.0, "/m/1"'])
def test_bad_audioset_row(tmp_path, row):
    path = tmp_path / "eval_segments.csv"
    path.write_text(f"# YTID, start_seconds, end_seconds, positive_labels\n{row}\n")
    write(tmp_path / "a.wav", signal(0.1))
    with pytest.raises(AarError, match=r"eval_segments\.csv:2: not YTID"):
        find_audio(tmp_path)


def test_audioset_without_its_clips(tmp_path):
    (tmp_path / "eval_segments.csv").write_text('a, 0.0, 10.0, "/m/1"\n')
    with pytest.raises(AarError, match="none of its clips"):
        find_audio(tmp_path)


def test_shards(tmp_path):
    files = {name: write(tmp_path / name, signal(0.5, seed=i)).read_bytes()
             for i, name in enumerate(("a.wav", "b.flac", "c.ogg", "d.mp3"))}  # fmt: skip
    members = {
        "000.wav": files["a.wav"], "000.cls": b"dog\n",
        "001.flac": files["b.flac"], "001.json": b'{"label": "cat"}',
        "birds/002.ogg": files["c.ogg"], "birds/002.json": b'{"text": "a bird"}',
        "003.mp3": files["d.mp3"], "003.txt": b"caption",
    }  # fmt: skip
    path = shard(tmp_path / "shards" / "data-0000.tar", members)
    found = find_audio(tmp_path / "shards")
    assert [(r.member, r.label) for r in found] == [
        ("000.wav", "dog"), ("001.flac", "cat"), ("birds/002.ogg", "birds"), ("003.mp3", "")
    ]  # fmt: skip
    assert find_audio(path) == found
    for recording, name in zip(found, files, strict=True):
        plain = read_recording(find_audio(tmp_path / name)[0], 24000)
        torch.testing.assert_close(read_recording(recording, 24000), plain, rtol=0, atol=0)


def test_error_inside_a_shard_names_the_member(tmp_path):
    path = shard(tmp_path / "a.tar", {"x/bad.wav": b"not audio"})
    with pytest.raises(AarError, match=r"x/bad\.wav in .*a\.tar: not audio"):
        read_recording(find_audio(path)[0], 24000)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.tar", b"garbage" * 200, "bad.tar: not an uncompressed tar shard"),
        ("empty.txt", b"# nothing\n", "empty.txt: holds no recordings"),
        ("latin.txt", b"caf\xe9.wav\n", "latin.txt: not a text file"),
        ("data.xyz", b"", "data.xyz: neither a recording nor a list"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AarError) as caught:
        find_audio(tmp_path / name)
    assert message in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(AarError, match="holds no recordings"):
        find_audio(tmp_path)
    with pytest.raises(AarError, match="no such file or folder"):
        find_audio(tmp_path / "missing.jsonl")
