"""Names are printed, never interpreted: no markup, no emoji codes, no formulas, no control characters."""

import io
import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from matplotlib.figure import Figure
from rich.console import Console

import jaxprune
from jaxprune import plot, rules, storage, structured
from jaxprune._cli._parser import main
from jaxprune.choose import Sensitivity
from tests.support.slow import slow_but

# Markup that closes nothing, colours, emoji, links, formulas that are none, format strings, scripts of other directions.
NAMES = [
    "[/]", "[red]", "[bold]x[/bold]", ":smile:", "[link=\"><svg/onload=alert(1)>]x", r"$\frac$", "$", "a$b$c", "{0}", "%s",
    "<b>", "&amp;", "\\", "[@click=app.quit]x", "\u05d0\u05d1", "\u540d\u524d", "[", "]]", "[[", "\\[red]",
]  # fmt: skip
CONTROL = ["\x1b[31mred", "bell\x07", "\u202eright", "zero\u200bwidth", "tab\there"]
# Of which random names are put together.
PIECES = [
    *NAMES, *CONTROL, "]", "/", "\\frac", "{", "}", "<svg/onload=x>", '"', "'", "\x00", "\n", "\r", "\x9b31m", "\u2028", "\x7f", "\ufeff",
    "\ud800", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301", "^", "_", "#", "|", "`", "*", "a", "0", ".", " ",
]  # fmt: skip


def random_names(seed: int) -> list[str]:
    """Names of up to six pieces, the empty one and one of ten thousand characters among them."""
    draw = random.Random(seed)
    return list(
        dict.fromkeys(["", "[x]" * 3_000, *("".join(draw.choices(PIECES, k=draw.randint(1, 6))) for _ in range(6))])
    )


def is_text(text: str) -> bool:
    """Whether a terminal obeys nothing of it, and every encoder takes it."""
    return all(c.isprintable() or c == "\n" for c in text)


def everything(path: str, leaf: object) -> bool:
    return True


def shown(result) -> str:
    """What a terminal of some width would show, without its colours."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(result)
    return console.file.getvalue()


def model(name):
    return {name: {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}}


def apply(params, x):
    (leaf,) = [value["kernel"] for value in params.values()]
    return jnp.tanh(x @ leaf) @ leaf.T


@pytest.mark.parametrize("name", slow_but(["[/]", ":smile:", "\x1b[31mred"], [*NAMES, *CONTROL]))
def test_every_table_shows_a_name_as_it_is(name):
    params = model(name)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, prunable=lambda path, leaf: True)
    curves = jaxprune.sensitivity(
        lambda p: jnp.float32(1), params, [0.5], rule=rules.layer_sparsity, prunable=everything
    )
    results = [
        jaxprune.summarize(params, masks, prunable=everything),
        jaxprune.find_sites(apply, params, jnp.ones((2, 8))),
        structured.trace(apply, params, jnp.ones((2, 8))),
        curves,
    ]
    wanted = name if name.isprintable() else name.encode("unicode_escape").decode()
    for result in results:
        for text in (shown(result), str(result)):
            assert wanted in text, type(result).__name__
            assert "\x1b" not in text
            assert "\x07" not in text
        page = result._repr_html_()
        assert "<svg" not in page
        assert "href" not in page


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("name", slow_but([r"$\frac$"], NAMES))
def test_figures_and_the_page_draw_a_name_as_it_is(name, tmp_path):
    params = model(name)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, prunable=everything)
    curves = Sensitivity(
        ks=(0.5,), groups=(name,), paths=((f"{name}/kernel",),), sizes=(64,), dense=1.0,
        metric=np.array([[0.9]]), sparsity=np.array([[0.5]]), together=np.array([0.9]), together_sparsity=np.array([0.5]),
    )  # fmt: skip
    jaxprune.report(tmp_path / "page.html", params, masks, title=name, sensitivity=curves, prunable=everything)
    page = (tmp_path / "page.html").read_text()
    assert "<svg" not in page
    figure = Figure()
    axes = plot.accuracy([0.0, 0.5], {name: [1.0, 0.9]}, figure.subplots(), label=name)
    figure.savefig(tmp_path / "figure.png")
    assert axes.get_ylabel().replace(r"\$", "$") == name


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name])
def test_commands_show_a_name_as_it_is(name, tmp_path, capsys):
    source, target = str(tmp_path / "m"), str(tmp_path / "out")
    safetensors.numpy.save_file({f"{name}.weight": np.eye(8, dtype=np.float32)}, source)
    assert main(["summarize", source]) == 0
    assert f"{name}.weight" in capsys.readouterr().out
    assert main(["prune", source, target, "--rule", "layer_sparsity", "--k", "0.5", "--only", "*"]) == 0
    assert f"{name}.weight" in capsys.readouterr().out
    assert main(["diff", source, target]) == 0
    assert main(["summarize", target, "--json"]) == 0
    out = json.loads(capsys.readouterr().out.split("no differences\n")[-1])
    assert [row["path"] for row in out["tensors"]] == [f"{name}.weight"]
    other = str(tmp_path / "other")
    safetensors.numpy.save_file({f"{name}.weight": np.ones((8, 8), np.float32)}, other)
    assert main(["diff", source, other]) == 1
    assert f"{name}.weight" in capsys.readouterr().out
    assert storage.summarize_file(target).tensors[0].path == f"{name}.weight"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.filterwarnings("ignore:Matplotlib currently does not support")
@pytest.mark.parametrize("seed", range(3))
def test_random_names_reach_every_table_page_and_figure_as_text(seed, tmp_path):
    names = random_names(seed)
    params = {name: model(name)[name] for name in names}
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, prunable=everything)

    def chain(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return x

    x = jnp.ones((2, 8))
    summary = jaxprune.summarize(params, masks, prunable=everything)
    graph = structured.trace(chain, params, x)
    plan = structured.select_channels(graph, params, 0.5)
    column = np.full((len(names), 1), 0.5)
    curves = Sensitivity(
        ks=(0.5,), groups=tuple(names), paths=tuple((f"{name}/kernel",) for name in names), sizes=(64,) * len(names),
        dense=1.0, metric=column, sparsity=column, together=np.array([0.9]), together_sparsity=np.array([0.5]),
    )  # fmt: skip
    k = jaxprune.search_k(
        lambda p: jnp.float32(1), params, max_drop=0.5, rule=rules.layer_sparsity, prunable=everything, steps=2
    )
    sites = jaxprune.find_sites(chain, params, x)
    for result in (summary, sites, graph, curves, k, structured.verify(graph, plan, params, x)):
        for text in (shown(result), str(result)):
            assert is_text(text), type(result).__name__
        page = result._repr_html_()
        assert not {"<svg", "<b>", "href"} & {tag for tag in ("<svg", "<b>", "href") if tag in page}
        page.encode()
    history = [{"step": 0, "sparsity": 0.5, "churn": 0.1}]
    few = {name: params[name] for name in names[:3]}
    jaxprune.report(
        tmp_path / "page.html", few, {name: masks[name] for name in few}, title="".join(names), sensitivity=curves,
        history=history, prunable=everything,
    )  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    assert is_text(page)
    assert "<svg" not in page
    for draw in (
        lambda axes: plot.sparsity_by_layer(summary, axes),
        lambda axes: plot.sensitivity_curves(curves, axes),
        lambda axes: plot.accuracy([0.0, 0.5], {name: [1.0, 0.9] for name in names}, axes, label=names[-1]),
    ):
        figure = Figure()
        draw(figure.subplots())
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("name", ["[red]\x1b[31m", "$\\frac$", "[link=x]<svg>", "n\new", "\u202e"])
def test_commands_show_the_names_of_files_as_text(name, tmp_path, capsys):
    source, target, other = (str(tmp_path / f"{name}{i}") for i in range(3))
    safetensors.numpy.save_file({"layer.weight": np.eye(8, dtype=np.float32)}, source)
    prune = ["prune", source, target, "--rule", "layer_sparsity", "--k", "0.95"]
    assert main(prune) == 0
    assert main(prune) == 2  # it is there already
    assert main([*prune, "--only", name]) == 2  # there is no such tensor
    assert main(["convert", target, other, "--dense"]) == 0
    assert main(["convert", target, target, "--force"]) == 2
    assert main(["diff", source, other]) == 1
    assert main(["summarize", source]) == 0
    assert main(["summarize", source + name]) == 2
    assert main(["report", source, str(tmp_path / "page.html")]) == 0
    with pytest.raises(SystemExit):
        main([*prune, name])
    printed = capsys.readouterr()
    assert is_text(printed.out)
    assert is_text(printed.err)
    page = (tmp_path / "page.html").read_text()
    assert is_text(page)
    assert "<svg" not in page
