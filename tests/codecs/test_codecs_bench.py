"""The benchmark of other packages' quantizers compares what computes the same."""

from __future__ import annotations

from argparse import Namespace

import pytest

from aar_kernels.bench import codecs


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", ["ResidualVQ 8", "SNAC 24 kHz, 3"])
def test_cases(name, monkeypatch):
    monkeypatch.setattr(codecs, "CODECS", [codec for codec in codecs.CODECS if codec.name == name])
    cases = list(codecs.cases(Namespace(batch=[1], no_compile=True, shapes="small")))
    if not cases:
        pytest.skip("the package is not installed")
    assert [case.name for case in cases] == [f"{name} {what}" for what in ("encode", "decode", "training")]
    for case in cases:
        assert list(case.variants) == ["ours", "eager"]
        assert case.check() == ""
        right = case.variants["ours"]()
        case.variants["ours"] = lambda right=right: [x + 1 for x in right] if isinstance(right, list) else right + 1
        assert case.check().startswith("ours: ")
