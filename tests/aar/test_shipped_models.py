"""The models that ship: they load offline, stay small, and are as good as their card says."""

from __future__ import annotations

import json

import pytest
import torch

from aar import AAR, SAT, cli
from aar.demo.recordings import CLIPS
from aar.errors import CheckpointError
from aar.models.pretrained import SHIPPED, shipped

SMALL = SHIPPED / "small"


def test_names():
    assert shipped() == ["small"]
    for kind in (SAT, AAR):
        with pytest.raises(CheckpointError, match="large"):
            kind.from_pretrained("large")


def test_a_directory_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sat = SAT.from_pretrained("small")
    with torch.no_grad():
        sat.quantizer.codebooks[0, 0] = 7.0
    sat.save_pretrained("small")
    assert SAT.from_pretrained("small").quantizer.codebooks[0, 0, 0] == 7.0


def test_together_below_25_megabytes():
    assert sum(path.stat().st_size for path in SMALL.rglob("*") if path.is_file()) < 25e6


def test_the_transformer_is_of_this_tokenizer():
    sat, aar = SAT.from_pretrained("small"), AAR.from_pretrained("small")
    assert torch.equal(sat.quantizer.codebooks, aar.quantizer.codebooks)
    assert not sat.training
    assert not aar.training


def test_metrics_of_the_card(tmp_path, capsys):
    """By the card's own command, on the clips that are in this repository."""
    out = tmp_path / "metrics.json"
    assert cli.main(["evaluate", str(CLIPS), "--aar", "small", "--device", "cpu", "--json", str(out)]) == 0
    found, claimed = json.loads(out.read_text()), json.loads((SMALL / "clips.json").read_text())
    assert found["recordings"] == claimed["recordings"]
    for scale, metrics in claimed["scales"].items():
        # Rounding decides a code here and there, and each code sounds.
        for name, value in metrics.items():
            assert found["scales"][scale][name] == pytest.approx(value, rel=0.01, abs=0.02), (scale, name)
    assert found["nll"]["nats_per_token"] == pytest.approx(claimed["nll"]["nats_per_token"], rel=0.005)
    card = (SMALL / "README.md").read_text()
    for scale in claimed["scales"]:
        assert f"{claimed['scales'][scale]['mel']:.2f}" in card
    assert f"{claimed['nll']['nats_per_token']:.3f}" in card


def test_info_describes_both(capsys):
    assert cli.main(["info", "small"]) == 0
    text = capsys.readouterr().out
    assert "SAT, 3.6 M" in text
    assert "AAR, " in text
    assert "model card" in text
