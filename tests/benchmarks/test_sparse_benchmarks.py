"""The benchmarks of pruning while training run at a tiny size and report what they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sparse_quality, sparse_step, timing

pytestmark = pytest.mark.slow


def results(main: Any, folder: Path, *arguments: str) -> Any:
    main([*arguments, "--json", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text())


def test_steps_are_compared_with_plain_adam(tmp_path):
    arguments = ("--networks", "mlp", "--width", "16", "--steps", "1", "--repeats", "1")
    (network,) = results(sparse_step.main, tmp_path, *arguments)
    assert network["parameters"] == 5 * (16 * 16 + 16)
    assert [case["every"] for case in network["cases"]] == [sparse_step.NEVER, 1, 10]
    variants = ["adam", "prune, std", "prune, layer", "prune, global", "rigl"]
    for case in network["cases"]:
        assert [row["variant"] for row in case["rows"]] == [*variants, variants[0] + timing.CONTROL]
        assert all(row["wall"] > 0 for row in case["rows"])
    # A byte for each mask's entry, and the count of the updates.
    for name, added in network["state_bytes_per_weight"].items():
        assert added == pytest.approx(0 if name == "adam" else 1 + 4 / network["parameters"])


def test_every_method_has_the_sparsity_it_is_asked_for(tmp_path):
    markdown = tmp_path / "table.md"
    arguments = ("--data", "digits", "--seeds", "1", "--steps", "60", "--markdown", str(markdown))
    rows = results(sparse_quality.main, tmp_path, *arguments)["digits"]
    assert len(rows) == 1 + 2 * 3 + 3 * 2 + 3 * 2 + 2 * 2
    for row in rows:
        asked = {"": 0.0, "2:4": 0.5, "1:4": 0.75}.get(row["asked"])
        asked = float(row["asked"].removesuffix(" %")) / 100 if asked is None else asked
        # A weight that is kept may be zero by itself: of units that are never on.
        assert asked - 1e-4 <= row["removed"] < asked + 0.01, row
        assert 0 <= row["accuracy"] <= 1
    assert next(row["accuracy"] for row in rows if row["method"] == "dense") > 0.5
    assert "| RigL |" in markdown.read_text()
