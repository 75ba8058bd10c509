"""The benchmark of generation: it finds what is wrong, does not time it, and writes what it prints."""

import copy
import json

import pytest
import torch
from benchmark_cases import TINY, codes_of, conditions, tiny_aar

from aar.baselines.plain_aar import PlainAAR
from benchmarks import agreement, generation
from benchmarks.agreement import Truth, check_greedy, check_weights, difference, rounded
from benchmarks.roofline import next_token_passes, scale_passes

ARGUMENTS = ["--threads", "1", "--batch", "2", "--runs", "1", "--no-compile", "--tokens", "3"]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("full", [False, True])
def test_table_and_json(quick, tmp_path, capsys, full):
    extra = ["--full", "--weights", "fp32", "int8"] if full else ["--profile"]
    assert generation.main([*ARGUMENTS, *extra, "--json", str(tmp_path / "out.json")], TINY) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert [row["shape"] for row in written["rows"]] == ["batch 2, depth 2"]
    for row in written["rows"]:
        names = set(row["times_ms"])
        assert {"ours fp32", "ours int8", "plain PyTorch", "next token, 60, plain PyTorch",
                "next token, 10, kernels int8"} <= names  # fmt: skip
        assert set(row["floor_ms"]) == set(row["timed_share"]) == names
        assert row["timed_share"]["ours fp32"] == 1
        assert row["timed_share"]["next token, 60, plain PyTorch"] == (1 if full else 3 / 60)
        assert all(0 < times["p20"] <= times["p50"] <= times["p80"] for times in row["times_ms"].values())
        assert all(name in printed for name in names)
    assert written["accuracy"]["ours fp32"]["same_codes"] == 1
    assert ("ms by operator" in printed) != full


def test_a_wrong_answer_is_not_timed(quick, monkeypatch, tmp_path, capsys):
    right = PlainAAR.generate
    monkeypatch.setattr(PlainAAR, "generate", lambda *args, **options: (right(*args, **options) + 1) % 50)
    timed = []
    monkeypatch.setattr(generation, "interleaved", lambda variants, *_, **__: timed.extend(variants) or {})
    assert generation.main(ARGUMENTS, TINY) == 1
    assert "WRONG plain PyTorch" in capsys.readouterr().out
    assert "ours fp32" in timed
    assert "plain PyTorch" not in timed


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_compared_with_what_they_were_rounded_to(dtype):
    model = tiny_aar()
    truth, codes = Truth(model, conditions()), codes_of(model)
    found, effects = check_weights(truth, codes, 4.0, dtype)
    assert found == ""
    assert (effects["rms"] > 1e-4) == (dtype != torch.float32)
    assert effects["rms"] <= effects["max"] < effects["rms_of_logits"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_weight_is_found(dtype, monkeypatch):
    model = tiny_aar()
    truth, codes, right = Truth(model, conditions()), codes_of(model), copy.deepcopy(model)
    truth(codes)  # is remembered
    monkeypatch.setattr(agreement, "rounded", lambda _, dtype: rounded(right, dtype))
    assert check_weights(truth, codes, 4.0, dtype)[0] == ""
    model.blocks[1].fc2.weight[3, 5] += 0.5
    assert "off by" in check_weights(truth, codes, 4.0, dtype)[0]


def test_narrow_activations_are_held_to_autocast(monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(agreement.generation, "_is_packed", lambda *_: False)
    model = tiny_aar()
    found, effects = check_weights(Truth(model, conditions()), codes_of(model), 4.0, torch.bfloat16)
    assert found == ""
    assert effects["rms"] > 1e-3


def test_greedy_codes_are_checked_one_by_one():
    model = tiny_aar()
    truth, codes = Truth(model, conditions()), model.sample(conditions(), cfg=4.0, temperature=0)
    assert check_greedy(truth, codes, 4.0) == ""
    for token in (0, 2, model.schedule.total - 1):
        other = codes.clone()
        other[1, token] = (other[1, token] + 1) % model.config.codebook_size
        assert "below the largest" in check_greedy(truth, other, 4.0)
    assert "below the largest" in check_greedy(truth, codes, 1.0)


def test_difference_allows_twice_plain_pytorch_and_one_rounding():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = (exact + 1e-5).float()
    assert difference((exact + 1.9e-5).float(), plain, exact) == ""
    assert difference((exact + 2.2e-5).float(), plain, exact)
    assert difference(torch.tensor([1.0, torch.nan]), plain, exact)


def test_least_work():
    """Against a count by hand: width 64, depth 2, latent 8, 50 codes, lengths 1, 3, 6, guided."""
    model = tiny_aar()
    weights = 2 * 12 * 64 * 64 + 8 * 64 + 50 * 64
    modulations, first, second, _ = scale_passes(model, 5, torch.bfloat16)
    assert (modulations.flops, modulations.weight_bytes) == (2 * 5 * 64 * (2 * 6 + 2) * 64, 4 * 64 * (2 * 6 + 2) * 64)
    assert first.weight_bytes == second.weight_bytes == 2 * weights
    assert first.flops == 2 * 5 * weights + 4 * 5 * 1 * 64 * 2
    assert second.flops == 2 * 10 * 3 * weights + 4 * 10 * 3 * 4 * 64 * 2
    assert second.cache_bytes == 2 * 10 * 4 * 64 * 2 * 4
    assert len(next_token_passes(model, 5, 30, torch.int8)) == 31
    assert second.floor(1e9, 1.0) == (second.weight_bytes + second.cache_bytes) / 1e6
    assert second.floor(1.0, 1e9) == second.flops / 1e6
