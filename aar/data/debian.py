"""Sound that Debian redistributes, from its own mirrors: unpacked and not installed, so that nobody need be root."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
import wave
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..atomic import replacing
from ..audio import AUDIO_SUFFIXES
from ..errors import AarError
from .sentences import sentences

__all__ = ["NAMES", "Fetched", "add_to_sources", "fetch"]

# Package -> (folder or Doom archive in the package, label) of what is taken; the first that fits counts.
_PACKAGES = {
    "hedgewars-data": (("Data/Sounds/voices", "speech"), ("Data/Sounds", "effects"), ("Data/Music", "music")),
    "warzone2100-music": (("music", "music"),),
    "wesnoth-music": (("data/core/music", "music"),),
    "freedoom": (("doom/freedoom2.wad", "effects"),),  # freedoom1.wad holds most of the same
}
_SPEECH = "flite"
_INSTALLED = Path("/")
NAMES = (*_PACKAGES, _SPEECH)

# Not flite's awb_time, which can only tell the time.
_VOICES = ("kal", "kal16", "awb", "rms", "slt")

_LICENCES = "licences"
_SOURCES = """\
# Where the recordings come from

Debian packages. Recordings are unchanged, but freedoom's are taken out of its archive into wav files, and flite's were
spoken by it.

| package | version | recordings | licences |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Fetched:
    """What came of one package: recordings by label, and the text of its licences, which covers all of its source."""

    package: str
    version: str
    recordings: dict[str, int]
    licence: Path


def fetch(name: str, out: Path) -> Fetched:
    """Puts the recordings of one of `NAMES` at ``out/LABEL/PACKAGE/...``, its licence at ``out/licences/PACKAGE.txt``.

    Raises:
        AarError: there is no apt-get, or it cannot get the package.
        OSError: `out` cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="aar-fetch-") as folder:
        if name == _SPEECH:
            return _speak(out, Path(folder))
        package = _current(name)
        root, version = _unpack(package, Path(folder))
        counts: Counter[str] = Counter()
        for place, label in _PACKAGES[name]:
            for top in sorted(root.glob(f"usr/share/games/**/{place}")):
                counts[label] += _take(top, out / label / package)
        return _finish(package, version, counts, root, out)


def add_to_sources(out: Path, fetched: Fetched) -> None:
    """Writes the package's row into ``out/SOURCES.md``."""
    path = out / "SOURCES.md"
    head = _SOURCES.splitlines()
    kept = path.read_text().splitlines()[len(head) :] if path.exists() else []
    rows = {row.split("|")[1].strip(): row for row in kept if row.startswith("|")}
    labels = ", ".join(f"{count} in {label}/" for label, count in fetched.recordings.items())
    cells = fetched.package, fetched.version, labels, fetched.licence.relative_to(out)
    rows[fetched.package] = f"| {' | '.join(map(str, cells))} |"
    with replacing(path) as beside:
        beside.write_text("\n".join([*head, *(rows[package] for package in sorted(rows))]) + "\n")


def _current(name: str) -> str:
    """The package that holds the files: wesnoth's depends on that of the release's version."""
    if name != "wesnoth-music":
        return name
    found = re.search(r"Depends: (wesnoth-[\d.]+-music)", _run("apt-cache", "depends", name))
    return found[1] if found else name


def _unpack(package: str, folder: Path) -> tuple[Path, str]:
    """The tree of a package, and its version."""
    # As root, apt would download as another user, who may not write here.
    _run("apt-get", "-o", "APT::Sandbox::User=root", "-qq", "download", package, cwd=folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    root = folder / "root"
    _run("dpkg-deb", "-x", str(archive), str(root))
    return root, _run("dpkg-deb", "-f", str(archive), "Version").strip()


def _take(top: Path, target: Path) -> int:
    """Moves the recordings below a folder, or writes those of a Doom archive; returns how many."""
    if top.suffix == ".wad":
        return _write_lumps(top, target)
    found = [path for path in sorted(top.rglob("*")) if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()]
    recordings = [path for path in found if not path.is_symlink()]
    for path in recordings:
        place = target / path.relative_to(top)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)
    return len(recordings)


def _write_lumps(path: Path, target: Path) -> int:
    """Writes the sounds of a Doom archive as wav, 8-bit as they are; returns how many."""
    target.mkdir(parents=True, exist_ok=True)
    sounds = {name: (rate, samples) for name, rate, samples in _lumps(path.read_bytes())}
    for name, (rate, samples) in sounds.items():
        with wave.open(str(target / f"{name}.wav"), "wb") as file:
            file.setparams((1, 1, rate, 0, "NONE", ""))
            file.writeframes(samples)
    return len(sounds)


def _lumps(archive: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Name, rate and unsigned 8-bit samples of sounds: lumps whose name begins with DS, in Doom's format 3."""
    _, entries, directory = struct.unpack_from("<4sII", archive)
    for entry in range(entries):
        offset, size, raw = struct.unpack_from("<II8s", archive, directory + 16 * entry)
        name = raw.rstrip(b"\0").decode("ascii", "replace")
        if not name.startswith("DS") or size < 8:
            continue
        kind, rate, count = struct.unpack_from("<HHI", archive, offset)
        if kind == 3 and count <= size - 8:
            # Sixteen samples at either end repeat the first and the last.
            yield name.lower(), rate, archive[offset + 24 : offset + 8 + count - 16]


def _speak(out: Path, folder: Path) -> Fetched:
    program, environment = shutil.which("flite"), None
    root = _INSTALLED
    if program is None:
        _unpack("libflite1", folder)
        root, version = _unpack("flite", folder)
        program = str(root / "usr/bin/flite")
        (library,) = root.glob("usr/lib/*/libflite.so.1")
        environment = {"LD_LIBRARY_PATH": str(library.parent)}
    else:
        version = _run("dpkg-query", "-W", "-f", "${Version}", "flite")
    target = out / "speech" / "flite"
    jobs = [(voice, number) for voice in _VOICES for number in range(len(sentences()))]
    for voice, number in tqdm(jobs, "speaking", unit=" sentences", delay=2, leave=False):
        place = target / voice / f"{number:03d}.wav"
        place.parent.mkdir(parents=True, exist_ok=True)
        _run(program, "-voice", voice, "-t", sentences()[number], "-o", str(place), env=environment)
    return _finish("flite", version, Counter(speech=len(jobs)), root, out)


def _finish(package: str, version: str, counts: Counter[str], root: Path, out: Path) -> Fetched:
    """Copies the licence."""
    if not counts.total():
        raise AarError(f"{package}: version {version} of the package holds no recordings where they are looked for")
    licence = out / _LICENCES / f"{package}.txt"
    licence.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "usr/share/doc" / package / "copyright", licence)
    return Fetched(package, version, dict(counts), licence)


def _run(*command: str, **options) -> str:
    """Standard output of a program.

    Raises:
        AarError: it is not there, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except FileNotFoundError:
        raise AarError(f"{command[0]}: not found; `aar data fetch` needs Debian's package tools") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise AarError(f"{' '.join(command[:6])}: {reason} (`apt-get update` first?)")
    return done.stdout
