"""The benchmark of memory: every way prunes alike, and what a large model would hold is counted right."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import block_by_block as benchmark

pytestmark = pytest.mark.slow


def test_a_tiny_model_is_pruned_alike_in_processes_of_their_own(tmp_path):
    ways = ["in sequence", "block by block, from disk"]
    benchmark.main(
        ["--small", "--calibration", "8", "--length", "16", "--repeat", "2", "--ways", *ways, "--json"]
        + [str(tmp_path / "results")]
    )
    found = json.loads((tmp_path / "results").read_text())
    weights = 2 * 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)  # of each layer twice
    assert found["model_bytes"] > 4 * weights
    assert [row["way"] for row in found["rows"]] == ways
    for row in found["rows"]:
        assert row["same_masks"] == {"in sequence": 1.0}
        assert row["peak_bytes"] > 0
        assert row["peak_of_model"] == row["peak_bytes"] / found["model_bytes"]


def test_seven_thousand_million_parameters_on_paper():
    held = benchmark.on_paper(benchmark.SEVEN, 128, 2048, jnp.bfloat16)
    block = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    model = 2 * (32 * block + 32_000 * 4096 + 4096)
    grams = 4 * (3 * 4096**2 + 11_008**2)  # of query, key and value; of the output; of gate and up; of down
    assert (held["the model"], held["all Gram matrices"]) == (model, 32 * grams)
    streams = 2 * 2 * 128 * 2048 * 4096
    one_block = 5 * block + 2 * 4 * 11_008**2  # in bfloat16 twice, and masks; Gram matrix and cross products
    assert held["all Grams at once"] == 2 * model + model // 2 + 32 * grams
    assert held["block by block"] == model + one_block + streams
    assert held["block by block, from disk"] == one_block + 2 * 2 * 2048 * 4096
