"""What ``pip install .`` installs, above all on a machine that cannot compile anything."""

from __future__ import annotations

import json
import zipfile
from email.parser import Parser

import pytest


@pytest.fixture(scope="module")
def wheel_without_compiler(pip_wheel, tmp_path_factory):
    destination = tmp_path_factory.mktemp("wheel")
    done = pip_wheel(destination, CXX="/bin/false")
    assert done.returncode == 0, done.stdout
    (wheel,) = destination.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout


def test_holds_every_file_of_both_packages_and_the_native_sources(wheel_without_compiler, checkout):
    wheel, _ = wheel_without_compiler
    expected = {"aar_kernels/_build_info.json"}
    for folder, name in (("aar", "aar"), ("aar_kernels", "aar_kernels"), ("csrc", "aar_kernels/csrc")):
        files = (path for path in (checkout / folder).rglob("*") if path.is_file())
        expected |= {f"{name}/{path.relative_to(checkout / folder).as_posix()}" for path in files}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected


def test_says_what_was_left_out_and_why(wheel_without_compiler):
    wheel, output = wheel_without_compiler
    record = json.loads(wheel.read("aar_kernels/_build_info.json"))
    assert record["built"] == {}
    assert set(record["left_out"]) == {"_native_torch", "_numpy"}
    for target, reason in record["left_out"].items():
        assert "/bin/false" in reason
        assert f"left out {target}: {reason}" in output
    assert "python -m aar_kernels.build" in output


def test_metadata(wheel_without_compiler):
    wheel, _ = wheel_without_compiler
    files = {name.partition(".dist-info/")[2]: name for name in wheel.namelist()}
    metadata = Parser().parsestr(wheel.read(files["METADATA"]).decode())
    assert metadata["License-Expression"] == "MIT"
    assert "licenses/LICENSE" in files
    assert "aar = aar.cli:main" in wheel.read(files["entry_points.txt"]).decode()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in required if "==" in line or "<" in line], "lower bounds only"
    assert "Root-Is-Purelib: false" in wheel.read(files["WHEEL"]).decode()


def test_forcing_the_build_makes_it_an_error(pip_wheel, tmp_path):
    done = pip_wheel(tmp_path, CXX="/bin/false", AAR_FORCE_BUILD="1")
    assert done.returncode != 0
    assert "AAR_FORCE_BUILD=1" in done.stdout
    assert not list(tmp_path.glob("*.whl"))


def test_an_earlier_build_does_not_stand_in_for_one_left_out(pip_wheel, checkout, tmp_path):
    libraries = next((checkout / "build").glob("lib*")) / "aar_kernels"
    (libraries / "_native_torch.so").write_bytes(b"from an earlier build")
    done = pip_wheel(tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
