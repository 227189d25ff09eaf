"""summarize: rows and totals by hand, plain data, a table, and figures that agree with the masks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import Summary, apply_masks, make_masks, sparsity, summarize

PARAMS = {
    "conv": {"kernel": jnp.array([3.0, -1.0, 1.0, -3.0]).reshape(1, 1, 2, 2), "bias": jnp.array([1.0, -1.0])},
    "dense": {"kernel": jnp.array([[0.5, -2.0, 4.0, 0.0]])},
}
MASKS = {
    "conv": {"kernel": jnp.array([True, False, True, True]).reshape(1, 1, 2, 2), "bias": jnp.ones(2, bool)},
    "dense": {"kernel": jnp.array([[False, True, True, False]])},
}


def strict_json(summary: Summary) -> dict:
    """The JSON text read by a reader that refuses NaN and Infinity, which are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(summary.to_json(), parse_constant=refuse)


def test_rows_and_totals_by_hand() -> None:
    summary = summarize(PARAMS, MASKS)
    bias, conv, dense = summary.rows
    assert (bias.path, bias.shape, bias.size, bias.kept, bias.sparsity) == ("conv/bias", (2,), 2, 2, 0.0)
    assert (bias.threshold, bias.std, bias.prunable) == (None, 1.0, False)
    assert (conv.path, conv.shape, conv.size, conv.kept) == ("conv/kernel", (1, 1, 2, 2), 4, 3)
    assert (conv.sparsity, conv.threshold, conv.prunable) == (0.25, 1.0, True)
    assert conv.std == pytest.approx(5**0.5)
    assert (dense.path, dense.kept, dense.sparsity, dense.threshold) == ("dense/kernel", 2, 0.5, 2.0)
    # 0.5, -2, 4, 0: mean 0.625, mean square 5.0625
    assert dense.std == pytest.approx((5.0625 - 0.625**2) ** 0.5)
    total = summary.prunable
    assert (total.size, total.kept, total.sparsity, total.compression) == (8, 5, 0.375, 1.6)
    total = summary.overall
    assert (total.size, total.kept, total.sparsity) == (10, 7, pytest.approx(0.3))
    assert total.compression == pytest.approx(10 / 7)


def test_plain_data_and_json() -> None:
    summary = summarize(PARAMS, MASKS)
    data = summary.to_dict()
    assert data["rows"][1]["path"] == "conv/kernel"
    assert data["prunable"] == {"size": 8, "kept": 5, "sparsity": 0.375, "compression": 1.6}
    text = strict_json(summary)
    assert text == json.loads(json.dumps(data))
    assert text["rows"][1]["shape"] == [1, 1, 2, 2]
    plain = (bool, int, float, str, type(None))
    assert all(type(value) in plain for row in data["rows"] for key, value in row.items() if key != "shape")


def test_the_table_shows_every_layer_and_both_totals() -> None:
    lines = str(summarize(PARAMS, MASKS)).splitlines()

    def cells(name: str) -> list[str]:
        (line,) = [line for line in lines if name in line and "│" in line]
        return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]

    assert cells("conv/kernel") == ["conv/kernel", "1 x 1 x 2 x 2", "1", "2.236", "3", "25.00%", "62"]
    assert cells("dense/kernel")[-3:] == ["2", "50.00%", "33"]
    assert cells("conv/bias")[-2:] == ["dense", "8"]
    assert cells("prunable weights") == ["prunable weights: 1.6 x fewer", "8", "", "", "5", "37.50%", "95"]
    assert cells("all weights") == ["all weights: 1.43 x fewer", "10", "", "", "7", "30.00%", "103"]
    assert any("dense/kernel has 2 dead unit(s)" in line for line in lines)


def test_bytes_and_multiply_accumulates_by_hand() -> None:
    bias, conv, dense = summarize(PARAMS, MASKS, uses={"conv/kernel": 25, "dense/kernel": 1}).rows
    assert (bias.dense_bytes, bias.stored_bytes, bias.int8_bytes) == (8, 8, 8)
    # 3 floats, 2 rows of one byte, 2 row offsets, 4 numbers of the shape; or 3 bytes and 2 scales instead of the floats
    assert (conv.dense_bytes, conv.stored_bytes, conv.int8_bytes) == (16, 12 + 2 + 16 + 32, 3 + 8 + 2 + 16 + 32)
    assert (dense.dense_bytes, dense.stored_bytes, dense.int8_bytes) == (16, 8 + 1 + 8 + 16, 2 + 16 + 1 + 8 + 16)
    assert [(row.macs, row.macs_kept) for row in (bias, conv, dense)] == [(0, 0), (100, 75), (4, 2)]
    assert [row.dead_units for row in (bias, conv, dense)] == [0, 0, 2]
    assert "MACs" in str(summarize(PARAMS, MASKS, uses={"dense/kernel": 1}))


def test_layers_that_collapse_are_named() -> None:
    params = {name: {"kernel": jnp.ones((300, 2))} for name in ("empty", "held", "whole")}
    rows = {"empty": 5, "held": 1, "whole": 600}
    masks = {name: {"kernel": (jnp.arange(600) < n).reshape(300, 2)} for name, n in rows.items()}
    assert summarize(apply_masks(params, masks), masks).remarks == [
        "empty/kernel is nearly empty: 5 of 600 weights stay.",
        "held/kernel keeps only its last weight: the guard held it, the layer is lost.",
        "held/kernel has 1 dead unit(s), all of whose weights are gone; channels could be cut.",
    ]


def test_masks_that_are_not_applied_are_said() -> None:
    params = {
        "a": {"kernel": jnp.array([[1.0, 2.0], [3.0, jnp.nan]])},
        "b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    masks = {
        "a": {"kernel": jnp.array([[True, False], [True, False]])},
        "b": {"kernel": jnp.array([[True, True], [True, False]]), "bias": jnp.array([True, False])},
    }
    found = summarize(params, masks)
    assert [row.unapplied for row in found.rows] == [2, 1, 1]  # a NaN is not zero either; nor need a leaf be prunable
    assert found.remarks[0] == "None of the 4 pruned weights is zero: these are the weights before apply_masks."
    assert "the weights before apply_masks" in " ".join(str(found).split())
    assert found.to_dict()["rows"][0]["unapplied"] == 2
    applied = apply_masks(params, masks)
    assert [row.unapplied for row in summarize(applied, masks).rows] == [0, 0, 0]
    assert "apply_masks" not in str(summarize(applied, masks))
    # An optimizer that does not know the masks has moved one of them.
    applied["b"]["kernel"] = applied["b"]["kernel"].at[1, 1].set(-1e-3)
    assert summarize(applied, masks).remarks[0] == (
        "1 of 4 pruned weights are not zero, in 1 layer(s), b/kernel the first: did you call apply_masks?"
    )
    stack = {"kernel": jnp.ones((2, 2, 2))}
    some = {"kernel": jnp.ones((2, 2, 2), bool).at[1, 0].set(False)}
    assert [row.unapplied for row in summarize(stack, some, stacked="*").rows] == [0, 2]


def test_pruning_does_not_change_the_counts() -> None:
    """Counts come from the masks: a weight that is zero by chance (the last of dense) counts as its mask says."""
    masks = MASKS | {"dense": {"kernel": jnp.ones((1, 4), bool)}}
    assert summarize(PARAMS, masks).rows[2].kept == 4
    before, after = summarize(PARAMS, MASKS), summarize(apply_masks(PARAMS, MASKS), MASKS)
    assert [row.kept for row in before.rows] == [row.kept for row in after.rows]
    assert [row.threshold for row in before.rows] == [row.threshold for row in after.rows]
    assert before.prunable == after.prunable


def test_each_layer_of_a_stack_has_a_row() -> None:
    params = {"layers": {"kernel": jnp.array([[[1.0, 2.0]], [[30.0, 40.0]]]), "bias": jnp.ones((2, 3))}}
    masks = {"layers": {"kernel": jnp.array([[[True, True]], [[False, True]]]), "bias": jnp.ones((2, 3), bool)}}
    rows = summarize(params, masks, stacked="layers").rows
    assert [(row.path, row.shape, row.kept, row.threshold, row.prunable) for row in rows] == [
        ("layers/bias[0]", (3,), 3, None, False),
        ("layers/bias[1]", (3,), 3, None, False),
        ("layers/kernel[0]", (1, 2), 2, None, True),
        ("layers/kernel[1]", (1, 2), 1, 40.0, True),
    ]
    assert [row.std for row in rows[2:]] == [0.5, 5.0]


def test_prunable_of_your_own() -> None:
    summary = summarize(PARAMS, MASKS, prunable=lambda path, leaf: path.startswith("dense"))
    assert (summary.prunable.size, summary.prunable.kept) == (4, 2)
    assert [row.prunable for row in summary.rows] == [False, False, True]
    assert summary.overall == summarize(PARAMS, MASKS).overall


def test_masks_that_are_none_integers_keys_and_empty_leaves() -> None:
    params = {
        "kernel": jnp.ones((2, 2)),
        "empty": {"kernel": jnp.ones((0, 3))},
        "steps": jnp.arange(3),
        "key": jax.random.key(0),
    }
    masks = make_masks(params, 0.5) | {"steps": None}
    rows = {row.path: row for row in summarize(params, masks).rows}
    assert (rows["empty/kernel"].size, rows["empty/kernel"].sparsity, rows["empty/kernel"].std) == (0, 0.0, None)
    assert (rows["steps"].size, rows["steps"].kept, rows["steps"].std) == (3, 3, None)
    assert (rows["key"].size, rows["key"].kept, rows["key"].prunable) == (1, 1, False)
    assert strict_json(summarize(params, masks))["overall"]["size"] == 8


@pytest.mark.parametrize(
    ("weights", "mask"),
    [
        ([[1.0, 2.0]], [[False, False]]),  # nothing left: neither a threshold nor a finite compression
        ([[np.nan, np.nan]], [[True, False]]),
        ([[np.inf, 1.0]], [[True, False]]),
    ],
)
def test_extremes_are_json_too(weights: list, mask: list) -> None:
    summary = summarize({"kernel": jnp.array(weights)}, {"kernel": jnp.array(mask)})
    assert strict_json(summary)["rows"][0]["kept"] == sum(mask[0])
    assert "kernel" in str(summary)


@pytest.mark.slow
def test_counts_are_exact_beyond_the_float32_integers() -> None:
    mask = jnp.ones((4097, 4096), bool).at[-1, -1].set(False)
    row = summarize({"kernel": jnp.ones((4097, 4096), jnp.bfloat16)}, {"kernel": mask}).rows[0]
    assert (row.size, row.kept) == (4097 * 4096, 4097 * 4096 - 1)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), k=st.floats(0, 1.5))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_the_report_agrees_with_the_masks(seed: int, k: float) -> None:
    rng = np.random.default_rng(seed)
    params = {name: {"kernel": jnp.asarray(rng.normal(size=(8, 9)), jnp.float32)} for name in "ab"}
    masks = make_masks(params, k)
    summary = summarize(params, masks)
    for row, name in zip(summary.rows, "ab", strict=True):
        kernel, mask = np.asarray(params[name]["kernel"]), np.asarray(masks[name]["kernel"])
        assert row.kept == mask.sum()
        assert row.std == pytest.approx(kernel.std(), rel=1e-6)
        assert row.threshold == (None if mask.all() else np.abs(kernel[mask]).min())
    assert summary.prunable.sparsity == pytest.approx(float(sparsity(masks)), abs=1e-6)
