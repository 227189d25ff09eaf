"""Results of many layers fit on a screen: numbered layers share a row, and what was measured is still all there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxprune
from jaxprune import plot, rules, structured
from jaxprune._printing import FEW_ROWS, folded, folded_lines
from jaxprune.choose import Sensitivity
from jaxprune.plot._figures import MAX_BARS, MAX_CURVES
from jaxprune.structured import OutputError, Verification
from tests.support.graph_zoo import normal

# cells of one column, in many rows; what is left of them
FOLDS: list[tuple[list[str], list[str]]] = [
    ([f"layers/{i}/w" for i in range(300)], ["layers/0…299/w (300)"]),
    # By value, in whatever order they come.
    ([f"Dense_{i}" for i in (10, 1, 100, 2, 20)], ["Dense_1…100 (5)"]),
    (["a/1/x", "b", "a/2/x", "a/1/y", "a/3/x"], ["a/1…3/x (3)", "b", "a/1/y"]),
    ([f"h/{i}/e/{j}" for i in range(3) for j in range(4)], ["h/0…2/e/0…3 (12)"]),
    (["at 1,024 of 4", "at 512 of 4", "at 2,048 of 4"], ["at 512…2,048 of 4 (3)"]),
    (["1.5 k", "2 M", "900 k", "12"], ["12…2 M (4)"]),
    (["1e-05 at 3%", "2.5e-07 at 12.5%", "0.1 at 3%"], ["2.5e-07…0.1 at 3…12.5% (3)"]),
    (["conv", "pool", "dense", "[red]", "$1$"], ["conv", "pool", "dense", "[red]", "$1$"]),
    (["int8 a", "int8 b", "int8 a", "x"], ["int8 a (2)", "int8 b", "x"]),
]


@pytest.mark.parametrize(("cells", "expected"), FOLDS)
def test_rows_that_differ_in_numbers_alone_are_one(cells: list[str], expected: list[str]) -> None:
    rows = [("", [cell]) for cell in cells]
    assert [cell for _, (cell,) in folded(rows, len(expected))] == expected
    assert folded(rows, len(cells)) == rows


def test_columns_and_styles_keep_rows_apart() -> None:
    rows = [("dim" if i % 2 else "", [f"l/{i}", "dense" if i < 2 else f"{i}%", "same"]) for i in range(8)]
    assert folded(rows, 5) == [
        ("", ["l/0", "dense", "same"]),
        ("dim", ["l/1", "dense", "same"]),
        ("", ["l/2…6 (3)", "2…6%", "same"]),
        ("dim", ["l/3…7 (3)", "3…7%", "same"]),
    ]


def test_what_does_not_fold_is_cut_off_with_its_number_and_what_is_bold_stays() -> None:
    words = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(200)]
    rows = [("bold" if i in (3, 190) else "", [word, "x"]) for i, word in enumerate(words)]
    found = folded(rows)
    assert len(found) == FEW_ROWS
    assert found[-1] == ("", ["… 151 more", ""])
    assert [cells[0] for style, cells in found if style] == [words[3], words[190]]
    assert found[0] == rows[0]
    assert folded_lines("\n".join(words)).split("\n")[-1] == "… 189 more"
    errors = [OutputError(word, 1.0 if i == 190 else 0.0, 1e-5) for i, word in enumerate(words)]
    assert words[190] in str(Verification("one", "other", tuple(errors)))


def layered(count: int) -> tuple[Any, Any]:
    params = {"layers": [{"up": normal(4, 8, salt=i), "bias": normal(8), "down": normal(8, 4)} for i in range(count)]}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["up"] + layer["bias"][None]) @ layer["down"]
        return x

    return fn, params


def test_three_hundred_layers_are_a_few_rows() -> None:
    _, params = layered(300)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool).at[..., 0].set(leaf.ndim < 2), params)
    masks["layers"][7]["up"] = masks["layers"][7]["up"].at[:, 2:].set(False)
    summary = jaxprune.summarize(params, masks)
    text = str(summary)
    assert len(text.splitlines()) < 30
    assert "layers/0…299/up (300)" in text
    assert "layers/0…299/bias (300)" in text
    assert "layers/0…299/up has 1…7 dead unit(s), all of whose weights are gone; channels could be cut. (300)" in text
    assert len(summary.rows) == len(summary.to_dict()["rows"]) == 900


def test_a_graph_and_sites_of_many_layers_are_a_few_rows() -> None:
    fn, params = layered(60)
    graph, sites = structured.trace(fn, params, normal(5, 4)), jaxprune.find_sites(fn, params, normal(5, 4))
    text = str(graph)
    assert len(text.splitlines()) < 60
    assert "layers/0…59/up[1] (60)" in text  # a group each
    assert "layers/0…59 (60)" in text  # a branch each
    assert (len(graph.groups), len(graph.blocks)) == (60, 60)
    assert len(str(sites).splitlines()) < 20
    assert "layers/0…59/down (60)" in str(sites)
    assert len(sites) == 120


def curves_of(count: int) -> Sensitivity:
    metric = 1 - np.linspace(0, 0.5, count)[:, None] * np.array([[0.1, 1.0]])
    names = tuple(f"layers/{i}/kernel" for i in range(count))
    sparsity = np.tile([[0.5, 0.9]], (count, 1))
    paths = tuple((name,) for name in names)
    return Sensitivity((0.5, 0.9), names, paths, (64,) * count, 1.0, metric, sparsity, metric[-1], sparsity[-1])


def test_sensitivities_of_many_layers_are_a_row_of_ranges() -> None:
    text = str(curves_of(300))
    assert len(text.splitlines()) < 12
    assert "layers/0…299/kernel (300)" in text
    assert "0.95…1" in text
    assert "0.5…1" in text
    assert len(curves_of(300).to_dict()["metric"]) == 300


@pytest.mark.slow
def test_a_page_and_figures_of_many_layers(tmp_path: Any) -> None:
    _, params = layered(100)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    page = tmp_path / "report.html"
    summary = jaxprune.report(page, params, masks, sensitivity=curves_of(100))
    text = page.read_text()
    assert text.count("<tr") < 20
    assert "layers/0…99/up (100)" in text
    assert len(summary.rows) == 300
    axes = plot.sparsity_by_layer(summary, Figure().subplots())
    assert len(axes.containers[0]) == 200
    assert len(axes.get_yticks()) <= MAX_BARS
    axes = plot.sensitivity_curves(curves_of(100), Figure().subplots())
    assert len(axes.lines) == 102
    named = [text.get_text() for text in axes.texts]
    assert len(named) <= MAX_CURVES + 2
    assert "layers/99/kernel" in named  # the one that costs most
    assert "all together" in named


def test_prefixes_reach_what_lies_below_them() -> None:
    """One entry for each of many layers is looked up by the paths above it; the nearest of two that cover a leaf counts."""
    _, params = layered(40)
    ks = {"layers": [{"up": i / 100, "down": 0.5} for i in range(40)]}
    masks = jaxprune.make_masks(params, ks, rule=rules.layer_sparsity)
    assert [int((~layer["up"]).sum()) for layer in masks["layers"]] == [round(32 * i / 100) for i in range(40)]
    assert all(int((~layer["down"]).sum()) == 16 for layer in masks["layers"])
    with pytest.raises(ValueError, match=r"k\['layers'\]\[40\] matches no leaf"):
        jaxprune.make_masks(params, {"layers": [0.5] * 41}, rule=rules.layer_sparsity)
