from __future__ import annotations

import json
import sys

import torch

from aar_kernels import dispatch, info


def test_json_lists_every_operator_with_every_backend(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["info", "--json"])
    info.main()
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] is not None
    assert report["operators"] == dispatch.operators()
    assert report["operators"], "no operator is registered"
    for backends in report["operators"].values():
        assert backends["reference"] is None


def test_text_gives_each_reason():
    report = info.collect()
    report["operators"] = {"some_operator": {"native": None, "triton": "there is no GPU"}}
    report["native"] |= {"library": None, "reason": "no native library: no compiler", "build": {}}
    text = info.render(report)
    assert torch.__version__.partition("+")[0] in text
    assert "no native library: no compiler" in text
    section = text[text.index("some_operator") :].splitlines()
    assert section[1].split() == ["native", "yes"]
    assert section[2].split() == ["triton", "no:", "there", "is", "no", "GPU"]


def test_sources_changed_since_the_build_are_reported(monkeypatch):
    monkeypatch.setattr(info.build, "source_hash", lambda: "another")
    monkeypatch.setattr(info._library, "record", lambda *_: {"built": {"_numpy": "x"}, "source_hash": "one"})
    assert "changed since this build: python -m aar_kernels.build" in info.render(info.collect())
