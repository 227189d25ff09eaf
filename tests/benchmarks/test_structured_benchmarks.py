"""The benchmarks of smaller networks run at a tiny size and report what they should; how fast anything is, is not tested."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import predicted_times, structured_quality
from jaxprune import structured

pytestmark = pytest.mark.slow


def test_every_way_to_choose_keeps_the_budget(tmp_path):
    arguments = ("--seeds", "0", "--epochs", "2", "0", "--tuning", "1", "0", "--no-torch", "--macs", "0.2", "0.2")
    structured_quality.main([*arguments, "--json", str(tmp_path / "results.json")])
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["network"] == "digits CNN"
    assert result["dense"] > 90
    rows = result["rows"]
    assert len(rows) == 11
    assert all(0 < row["macs"] <= 0.2 for row in rows.values())
    assert min(row["repaired"] for name, row in rows.items() if "random" not in name) > 80
    # A knapsack leaves less of the budget than a channel of every layer.
    assert all(row["macs"] > 0.19 for name, row in rows.items() if "knapsack" in name)


def test_scales_take_up_what_batches_are_normed_by():
    params, x = (
        structured_quality.resnet_params(0, 2),
        jnp.asarray(np.random.default_rng(0).random((4, 28, 28, 1)), jnp.float32),
    )
    found = structured_quality.resnet(structured_quality.fold(params, x), x)
    np.testing.assert_allclose(found, structured_quality.batch_normed(params, x), rtol=1e-4, atol=1e-5)


def test_mnist_is_read_from_its_files(tmp_path):
    pixels, labels = np.arange(3 * 784).astype(np.uint8), np.array([7, 1, 4], np.uint8)
    for name, head, data in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + data.tobytes()))
    data = structured_quality.pixels(tmp_path, 0)
    order = np.random.default_rng(0).permutation(3)
    np.testing.assert_array_equal(data.labels, labels[order])
    np.testing.assert_allclose(data.images, pixels.reshape(3, 28, 28, 1)[order] / 255, rtol=1e-6)


def test_channels_that_others_remove_are_those_that_go():
    params = structured_quality.cnn_params(0)
    graph = structured.trace(structured_quality.cnn, params, jnp.ones((2, 8, 8, 1)))
    plan = structured_quality.removed(graph, params, {"b/w": [0, 5, 63], "c/w": [1]})
    assert plan.kept["b/w"] == {3: tuple(n for n in range(64) if n not in (0, 5, 63))}
    assert plan.kept["d/w"] == {0: tuple(n for n in range(100) if n != 1)}
    assert "a/w" not in plan.kept


def test_predictions_are_made_for_each_budget(tmp_path):
    tiny = (
        "--size",
        "8",
        "--batch-size",
        "1",
        "--layers",
        "1",
        "--model-width",
        "16",
        "--length",
        "4",
        "--widths",
        "1",
    )
    chosen = ("--repeats", "1", "--shares", "1.0", "--cpu-time")
    predicted_times.main([*tiny, *chosen, "--json", str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["network"], row["share"]) for row in rows] == [
        (n, 1.0) for n in ("digits CNN", "transformer") for _ in range(2)
    ]
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in rows)
