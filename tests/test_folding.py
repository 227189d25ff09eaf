"""Results of many layers fit on a screen: numbered layers share a row, and what was measured is still all there."""

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import jaxprune
from jaxprune import plot, rules, structured
from jaxprune._printing import FEW_ROWS, folded, folded_lines, in_order
from jaxprune.choose import Sensitivity
from jaxprune.plot._figures import MAX_BARS, MAX_CURVES
from jaxprune.structured import OutputError, Verification
from tests.support.graph_zoo import normal

# cells of one column, in many rows; what is left of them
FOLDS: list[tuple[list[str], list[str]]] = [
    ([f"layers/{i}/w" for i in range(300)], ["layers/*/w x 300"]),
    (["a/1/x", "b", "a/2/x", "a/1/y", "a/3/x"], ["a/*/x x 3", "b", "a/1/y"]),
    ([f"h/{i}/e/{j}" for i in range(3) for j in range(4)], ["h/*/e/* x 12"]),
    ([f"layer_{i}/w[{i % 2}]\n  part of layer_{i}" for i in range(3)], ["layer_*/w[*] x 3\n  part of layer_*"]),
    ([f"h.{i}.q.w" for i in range(4)], ["h.*.q.w x 4"]),
    # Names have letters, or stand between slashes; other numbers by value, in whatever order they come.
    ([f"Dense_{i}" for i in (10, 1, 100, 2, 20)], ["Dense_* x 5"]),
    (["at 1,024 of 4", "at 512 of 4", "at 2,048 of 4"], ["at 512, 1,024, 2,048 of 4 x 3"]),
    (["at 1,024 of 4", "at 512 of 4"], ["at 512, 1,024 of 4 x 2"]),
    (["1.5 k", "2 M", "900 k", "12"], ["12, 1.5 k, 2 M x 4"]),
    (["1e-05 at 3%", "2.5e-07 at 12.5%", "0.1 at 3%"], ["2.5e-07, 1e-05, 0.1 at 3, 3, 12.5% x 3"]),
    (["l/3/w has 7 dead unit(s)", "l/12/w has 1 dead unit(s)"], ["l/*/w has 1, 7 dead unit(s) x 2"]),
    (["conv", "pool", "dense", "[red]", "$1$"], ["conv", "pool", "dense", "[red]", "$1$"]),
    (["int8 a", "int8 b", "int8 a", "x"], ["int8 a x 2", "int8 b", "x"]),
]

# Names in any order; by number.
ORDERS = [
    (["l/10/w", "l/2/w", "l/1/w"], ["l/1/w", "l/2/w", "l/10/w"]),
    (["z", "l_10/b", "l_10/a", "l_9/b", "l_9/a", "a"], ["z", "l_9/b", "l_9/a", "l_10/b", "l_10/a", "a"]),
    (["h.10.2.w", "h.10.1.w", "h.9.1.w", "h.9.w"], ["h.9.1.w", "h.9.w", "h.10.1.w", "h.10.2.w"]),
    (["w[10]", "w[9]", "v[1]"], ["w[9]", "w[10]", "v[1]"]),
    (["", "7", "x", "12", "5"], ["", "5", "7", "12", "x"]),
    (["l/9\u0665", "l/10"], ["l/9\u0665", "l/10"]),  # other scripts' digits are no numbers here
]


@pytest.mark.parametrize(("names", "expected"), ORDERS)
def test_numbered_layers_come_by_number_and_all_else_as_it_came(names: list[str], expected: list[str]) -> None:
    assert in_order(names) == expected
    assert in_order(expected) == expected


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
        ("", ["l/* x 3", "2, 4, 6%", "same"]),
        ("dim", ["l/* x 3", "3, 5, 7%", "same"]),
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
    assert "layers/*/up x 300" in text
    assert "layers/*/bias x 300" in text
    assert "layers/*/up has 1, 1, 7 dead unit(s), all of whose weights are gone; channels could be cut. x 300" in text
    assert len(summary.rows) == len(summary.to_dict()["rows"]) == 900


def test_in_full_each_layer_has_a_row() -> None:
    fn, params = layered(60)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    found = [
        jaxprune.summarize(params, masks),
        jaxprune.find_sites(fn, params, normal(5, 4)),
        structured.trace(fn, params, normal(5, 4)),
    ]
    for result in found:
        assert "layers/*/up" in str(result)
        text = str(result.table(full=True))
        lines = [line for line in text.splitlines() if "/up" in line]
        places = [next((i for i, line in enumerate(lines) if f"layers/{n}/up" in line), None) for n in range(60)]
        assert None not in places
        assert places == sorted(places)  # 2 before 10
        assert "*" not in text


def test_columns_break_between_numbers_and_names_have_the_rest() -> None:
    rng = np.random.default_rng(0)
    kernels = {
        f"layer_{i}": {"attention_norm": {"kernel": rng.normal(size=(2 * i + 40, 50)) / (i + 1)}} for i in range(60)
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), kernels)
    summary = jaxprune.summarize(params, jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity))
    for width in (80, 100, 120):
        console = Console(file=io.StringIO(), width=width, no_color=True)
        console.print(summary)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.startswith("│")]
        stds = [row.std for row in summary.rows]
        shown = [text for row in rows[:3] for text in [row[4].rstrip(",")] if text]
        assert shown == [f"{x:.4g}" for x in (min(stds), sorted(stds)[29], max(stds))]
        assert (
            "".join(row[1] for row in rows[:4] if row[1])
            .replace(" ", "")
            .startswith("layer_*/attention_norm/kernelx60")
        )


def test_a_plan_prints_how_many_stay() -> None:
    fn, params = layered(60)
    graph = structured.trace(fn, params, normal(5, 4))
    plan = structured.select_channels(graph, params, {f"layers/{i}/up": 0.25 * (1 + i % 3) for i in range(60)})
    text = str(plan)
    size, small = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, structured.shrink(plan, params))
    )
    assert f"What stays: {small:,} of {size:,} parameters" in text
    assert [" ".join(line.split()) for line in text.splitlines() if "layers" in line] == [
        f"│ layers/*/{name} x 60 │ 2, 4, 6 │ 8 │" for name in ("bias[0]", "down[0]", "up[1]")
    ]
    assert len(str(plan.table(full=True)).splitlines()) > 180
    dropped = structured.Plan(
        {"a": {0: (1,)}}, {"a": (4,), "b": (5,)}, dropped=("b",), to_repair=("a",), renumbered={"a": 0}
    )
    lines = [line.split("│") for line in str(dropped).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line[1:-1]] for line in lines] == [
        ["a[0]", "1", "4", "renumbered, to be repaired"],
        ["b", "", "", "dropped"],
    ]


def test_a_graph_and_sites_of_many_layers_are_a_few_rows() -> None:
    fn, params = layered(60)
    graph, sites = structured.trace(fn, params, normal(5, 4)), jaxprune.find_sites(fn, params, normal(5, 4))
    text = str(graph)
    assert len(text.splitlines()) < 60
    assert "layers/*/up[1] x 60" in text  # a group each
    assert "layers/* x 60" in text  # a branch each
    assert (len(graph.groups), len(graph.blocks)) == (60, 60)
    assert len(str(sites).splitlines()) < 20
    assert "layers/*/down x 60" in str(sites)
    assert len(sites) == 120


def curves_of(count: int) -> Sensitivity:
    metric = 1 - np.linspace(0, 0.5, count)[:, None] * np.array([[0.1, 1.0]])
    names = tuple(f"layers/{i}/kernel" for i in range(count))
    sparsity = np.tile([[0.5, 0.9]], (count, 1))
    paths = tuple((name,) for name in names)
    return Sensitivity((0.5, 0.9), names, paths, (64,) * count, 1.0, metric, sparsity, metric[-1], sparsity[-1])


def test_sensitivities_of_many_layers_are_a_row_of_ranges() -> None:
    text = str(curves_of(300))
    assert len(text.splitlines()) < 14
    assert "layers/*/kernel x 300" in text
    assert "0.95, 0.9749, 1" in text
    assert "0.5, 0.7492, 1" in text
    assert len(curves_of(300).to_dict()["metric"]) == 300


@pytest.mark.slow
def test_a_page_and_figures_of_many_layers(tmp_path: Any) -> None:
    _, params = layered(100)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    page = tmp_path / "report.html"
    summary = jaxprune.report(page, params, masks, sensitivity=curves_of(100))
    text = page.read_text()
    assert text.count('<div class="bar"') == 2
    assert "layers/*/up x 100" in text
    assert all(f">layers/{i}/up<" in text for i in range(100))
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
