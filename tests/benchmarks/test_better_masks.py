"""The benchmarks of masks beyond one layer, of learned masks and of experts run at a tiny size and report what they should."""

import json

import pytest

from benchmarks import beyond_layers, experts, learned_masks

pytestmark = pytest.mark.slow


def test_learned_masks_have_the_sparsity_they_are_asked_for(tmp_path):
    arguments = ["--small", "--steps", "2", "--updates", "2", "--windows", "8", "--out", str(tmp_path)]
    learned_masks.main([*arguments, "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["pattern"], row["start"]) for row in rows] == [
        (pattern, start) for pattern in ("60 %", "2:4") for start in learned_masks.STARTS
    ]
    for row in rows:
        assert row["removed"] == pytest.approx({"60 %": 0.6, "2:4": 0.5}[row["pattern"]], abs=1e-4)
        assert row["tokens"] == 2 * 4096
    assert rows[2]["before"] == pytest.approx(rows[2]["admm"])  # ADMM's weights under its own masks


def test_whatever_chooses_masks_removes_as_many(tmp_path):
    arguments = ["--small", "--steps", "2", "--updates", "4", "--windows", "8", "--out", str(tmp_path)]
    beyond_layers.main([*arguments, "--patterns", "90 %", "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["way"] for row in rows] == list(beyond_layers.WAYS)
    for row in rows:
        assert row["removed"] == pytest.approx(0.9, abs=1e-4), row
        assert row["tokens"] == (4 * 4096 if row["way"] in beyond_layers.TRAINED else 0)
        assert 0 < row["quality"] < 12
        assert row["dense_again"] < row["dense"]


def test_whatever_chooses_masks_of_a_scan_removes_as_many(tmp_path):
    arguments = ["--smollm2", "--small", "--steps", "2", "--updates", "4", "--windows", "2", "--patterns", "2:4"]
    beyond_layers.main([*arguments, "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["way"] for row in rows] == list(beyond_layers.WAYS)
    for row in rows:
        assert row["removed"] == pytest.approx(0.5, abs=1e-4), row
        assert row["tokens"] == (4 * 2 * 64 if row["way"] in beyond_layers.TRAINED else 0)
        assert 0 < row["quality"] < 12


def test_experts_are_dropped_and_merged(tmp_path):
    arguments = ["--steps", "2", "--width", "8", "--windows", "16", "--sparsities", "0.25"]
    experts.main([*arguments, "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["way"] for row in rows] == ["random", "frequency", "frequency, merged", "REAP", "REAP, merged"]
    assert all(0 < row["bits_per_byte"] < 12 for row in rows)
