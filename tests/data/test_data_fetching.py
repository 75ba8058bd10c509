"""`aar data fetch` with Debian's tools played by scripts that know two tiny packages."""

from __future__ import annotations

import os
import struct
import wave
from pathlib import Path

import pytest
from data_files import signal, write

from aar import cli
from aar.data import find_audio
from aar.data.debian import NAMES, _lumps
from aar.data.sentences import sentences

# `apt-get download NAME` copies NAME's tree as NAME_1.2_all.deb; `dpkg-deb` unpacks such a tree or tells its version.
TOOLS = {
    "apt-get": """
for package; do :; done
test -d "$POOL/$package" || { echo "E: Unable to locate package $package" >&2; exit 100; }
cp -r "$POOL/$package" "${package}_1.2_all.deb"
""",
    "apt-cache": 'echo "$2"; echo "  Depends: wesnoth-1.99-data"; echo "  Depends: wesnoth-1.99-music"\n',
    "dpkg-deb": 'if [ "$1" = -x ]; then cp -r "$2" "$3"; else echo 1.2; fi\n',
    "dpkg-query": "printf 2.2\n",
    "flite": 'test "$1 $3 $5" = "-voice -t -o" || exit 1; cp "$POOL/word.wav" "$6"\n',
}


def wad(sounds: dict[str, bytes]) -> bytes:
    """A Doom archive: each sound between sixteen samples of padding, and one lump that is none."""
    lumps = {
        name: struct.pack("<HHI", 3, 11025, len(s) + 32) + s[:1] * 16 + s + s[-1:] * 16 for name, s in sounds.items()
    }
    lumps |= {"DSPCBEEP": b"", "D_MUSIC": b"MUS\x1a" + bytes(20)}
    body, entries = b"", b""
    for name, content in lumps.items():
        entries += struct.pack("<II8s", 12 + len(body), len(content), name.encode())
        body += content
    return struct.pack("<4sII", b"IWAD", len(lumps), 12 + len(body)) + body + entries


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Folder of packages, with the tools first in PATH."""
    tools, pool = tmp_path / "tools", tmp_path / "pool"
    tools.mkdir()
    for name, script in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\nset -e\n{script}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("POOL", str(pool))

    def package(name: str) -> Path:
        document = pool / name / "usr/share/doc" / name / "copyright"
        document.parent.mkdir(parents=True)
        document.write_text(f"Licence of {name}")
        return pool / name / "usr/share/games"

    return package


def labels(out: Path) -> dict[str, str]:
    return {str(r.path.relative_to(out)): r.label for r in find_audio(out)}


def test_labels_licences_and_sources(pool, tmp_path, capsys):
    data = pool("hedgewars-data") / "hedgewars/Data"
    for name in ("Sounds/boom.ogg", "Sounds/voices/British/Yes.ogg", "Music/Main.ogg", "Graphics/logo.wav"):
        write(data / name, signal(0.1))
    os.symlink("boom.ogg", data / "Sounds" / "again.ogg")
    write(pool("wesnoth-1.99-music") / "wesnoth/1.99/data/core/music/theme.ogg", signal(0.1))
    out = tmp_path / "out"
    assert cli.main(["data", "fetch", "hedgewars-data", str(out)]) == 0
    assert cli.main(["data", "fetch", "wesnoth-music", "hedgewars-data", str(out)]) == 0
    assert labels(out) == {
        "effects/hedgewars-data/boom.ogg": "effects",
        "speech/hedgewars-data/British/Yes.ogg": "speech",
        "music/hedgewars-data/Main.ogg": "music",
        "music/wesnoth-1.99-music/theme.ogg": "music",
    }
    printed = capsys.readouterr().out
    assert "Licence of hedgewars-data" in printed
    assert "wesnoth-1.99-music 1.2: 1 music" in printed
    assert (out / "licences" / "wesnoth-1.99-music.txt").read_text() == "Licence of wesnoth-1.99-music"
    rows = [line for line in (out / "SOURCES.md").read_text().splitlines() if line.startswith("| ")]
    assert rows == [
        "| package | version | recordings | licences |",
        "| hedgewars-data | 1.2 | 1 in speech/, 1 in effects/, 1 in music/ | licences/hedgewars-data.txt |",
        "| wesnoth-1.99-music | 1.2 | 1 in music/ | licences/wesnoth-1.99-music.txt |",
    ]


def test_doom_sounds(pool, tmp_path):
    sounds = {"DSPISTOL": bytes(range(100, 150)), "DSBOOM": bytes(range(200, 230))}
    folder = pool("freedoom") / "doom"
    folder.mkdir(parents=True)
    (folder / "freedoom2.wad").write_bytes(wad(sounds))
    assert cli.main(["data", "fetch", "freedoom", str(tmp_path / "out")]) == 0
    for name, samples in sounds.items():
        with wave.open(str(tmp_path / "out/effects/freedoom" / f"{name.lower()}.wav")) as file:
            assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (11025, 1, 1)
            assert file.readframes(1000) == samples
    assert len(labels(tmp_path / "out")) == 2
    assert [name for name, _, _ in _lumps(wad(sounds))] == ["dspistol", "dsboom"]


def test_speech(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("aar.data.debian.sentences", lambda: ("One.", "Two."))
    root = tmp_path / "pool"
    write(root / "word.wav", signal(0.1, 16000), 16000)
    monkeypatch.setattr("aar.data.debian._INSTALLED", root / "flite")
    pool("flite")
    assert cli.main(["data", "fetch", "flite", str(tmp_path / "out")]) == 0
    found = labels(tmp_path / "out")
    assert len(found) == 10
    assert found["speech/flite/slt/001.wav"] == "speech"


def test_sentences():
    spoken = sentences()
    assert len(set(spoken)) == len(spoken) == 240
    words = {word.strip(".").lower() for sentence in spoken for word in sentence.split()}
    assert len(words) > 120


def test_errors(pool, tmp_path, capsys, monkeypatch):
    assert cli.main(["data", "fetch", "freedoom", str(tmp_path / "out")]) == 2
    assert "Unable to locate package freedoom (`apt-get update` first?)" in capsys.readouterr().err
    pool("warzone2100-music")
    assert cli.main(["data", "fetch", "warzone2100-music", str(tmp_path / "out")]) == 2
    assert "holds no recordings where they are looked for" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["data", "fetch", "freedoom", str(tmp_path / "out")]) == 2
    assert "apt-get: not found; `aar data fetch` needs Debian's package tools" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "fetch", "unheard-of", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert all(name in said for name in NAMES)
