"""The benchmarks of pruning while training run at a tiny size and report what they should."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import extreme_compression, mnist, sparse_quality, sparse_step, timing

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


def test_networks_are_as_many_times_smaller_as_asked(tmp_path):
    # 200 images, of which 120 train and 40 are measured on: the class is the row that is bright.
    labels = np.arange(200) % 10
    pixels = np.zeros((200, 28, 28), np.uint8)
    pixels[np.arange(200), 2 * labels + 4] = 255
    for name, header, content in (
        (mnist.IMAGES, 16, pixels),
        (mnist.LABELS, 8, labels.astype(np.uint8)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(bytes(header) + content.tobytes()))
    arguments = ("--data", str(tmp_path), "--networks", "LeNet-300-100", "--seeds", "0", "--epochs", "8")
    arguments = (*arguments, "--figure", str(tmp_path / "curve.svg"))
    (rows,) = results(extreme_compression.main, tmp_path, *arguments, "--compressions", "20").values()
    assert (tmp_path / "curve.svg").read_text().count("<!-- 20x -->") == 1
    dense, *pruned = rows
    assert (dense["method"], dense["error"]) == ("dense", 0)
    assert [row["method"] for row in pruned] == list(extreme_compression.METHODS)
    again, *pruned = pruned
    assert (again["asked"], again["compression"], again["error"]) == (1, 1, 0)
    for row in pruned:
        assert row["asked"] == 20
        # Biases stay; one that is exactly zero counts as gone.
        assert 20 - 1e-3 <= row["compression"] < 20.5


def test_a_network_of_the_papers_has_as_many_parameters():
    images = np.zeros((1, 28, 28, 1), np.float32)
    for name, parameters in {"LeNet-300-100": 266_610, "LeNet-5": 431_080}.items():
        params = jax.eval_shape(extreme_compression.CASES[name].network.init, jax.random.key(0), images)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
        kept = parameters / 111
        kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        removed = extreme_compression.sparsity_for(params, 111) * kernels
        assert parameters - removed == pytest.approx(kept)


def test_a_product_with_patches_is_a_convolution():
    images, kernel = (np.random.default_rng(0).normal(size=size) for size in ((2, 9, 8, 3), (5, 5, 3, 4)))
    expected = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = extreme_compression.patches(images, 5) @ kernel.reshape(-1, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
