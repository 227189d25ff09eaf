"""What a terminal, a notebook and a debugger show of a result: a table, a table of HTML, one line."""

import html.parser
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxprune
from jaxprune import rules, storage, structured
from jaxprune._iterate import Round
from jaxprune.choose import Strength, Trial
from tests.support.curves import CURVES

PARAMS = {
    "up": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.ones(4)},
    "down": {"kernel": jnp.ones((4, 2))},
}
X = jnp.ones((5, 3))


def fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


class Cells(html.parser.HTMLParser):
    """The rows of a page's tables, each a list of (side, text); all other text; the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[list[str]]] = []
        self.words, self.tags, self._open = [""], set[str](), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            style = dict(attrs)["style"]
            self.rows[-1].append([style.split(";")[0].removeprefix("text-align:"), ""])
            self._open = True
        elif tag == "br":
            self.handle_data("\n")

    def handle_endtag(self, tag):
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1][1] += data
        else:
            self.words.append(data)

    @property
    def texts(self) -> list[list[str]]:
        return [[text for _, text in row] for row in self.rows]


def everything(tmp_path: Any) -> dict[str, Any]:
    """A result of every kind that prints as a table."""
    masks = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity)
    graph = structured.trace(fn, PARAMS, X)
    plan = structured.select_channels(graph, PARAMS, 0.5)
    path = tmp_path / "model.safetensors"
    return {
        "Summary": jaxprune.summarize(PARAMS, masks),
        "Sites": jaxprune.find_sites(fn, PARAMS, X),
        "Norms": jaxprune.calibrate_norms(fn, PARAMS, [X]),
        "Grams": jaxprune.calibrate_grams(fn, PARAMS, [X]),
        "Graph": graph,
        "Plan": plan,
        "Verification": structured.verify(graph, plan, PARAMS, X),
        "Saved": jaxprune.save_sparse(path, PARAMS, masks),
        "FileOverview": storage.summarize_file(path),
        "Sensitivity": CURVES,
        "Strength": Strength(1.5, (Trial(1.5, 0.5, 0.9, True), Trial(3.0, 0.9, 0.1, False)), "a test", ("A remark.",)),
    }


@pytest.mark.filterwarnings("ignore:These parameters have met fewer samples")
def test_every_result_has_a_short_repr_a_text_and_a_table_of_html(tmp_path):
    found = everything(tmp_path)
    reprs = {name: repr(result) for name, result in found.items()}
    size = (tmp_path / "model.safetensors").stat().st_size
    assert reprs == {
        "Summary": "<Summary: 50.00% of 20 prunable weights removed, in 2 arrays of 3>",
        "Sites": "<Sites: 2 parameters by which data are multiplied, 1 elementwise>",
        "Norms": "<Norms: of 2 parameters, 2 inputs of 3 to 4 features>",
        "Grams": "<Grams: of 2 parameters, 2 inputs of 3 to 4 features>",
        "Graph": "<Graph: 3 parameters, 1 group, 0 blocks, 2 frozen axes>",
        "Plan": "<Plan: 12 of 24 parameters stay; 3 arrays cut, 0 dropped, of 3>",
        "Verification": "<Verification: The smaller function equals the masked one>",
        "Saved": f"<Saved: {tmp_path}/model.safetensors, {size:,} bytes, dense 96>",
        "FileOverview": f"<FileOverview: {tmp_path}/model.safetensors, {size:,} bytes, 50.00% of the prunable weights removed>",
        "Sensitivity": "<Sensitivity: 2 layers alone and all together, 3 strengths from 0.5 to 2; dense 0.9>",
        "Strength": "1.5",
    }
    for name, result in found.items():
        text, page = str(result), result._repr_html_()
        assert "\x1b" not in text + page, name
        assert not set("┏━┃│└┘") & set(page), name
        assert "<pre" not in page, name
        rows = Cells(page).texts
        assert len(rows) > 1, name
        assert rows[0][0] in text, name
        assert result.table()._repr_mimebundle_(include=None, exclude=None) == {"text/plain": text, "text/html": page}


def test_a_table_of_html_is_aligned_and_says_the_same():
    masks = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity)
    summary = jaxprune.summarize(PARAMS, masks)
    page = Cells(summary._repr_html_())
    down, bias, up = (row.stored_bytes for row in summary.rows)
    assert page.rows[0] == [
        ["left", "layer"], *(["right", head] for head in ("shape", "threshold", "std", "kept", "sparsity", "bytes"))
    ]  # fmt: skip
    assert page.texts[1:] == [
        ["down/kernel", "4 x 2", "1", "0", "4", "50.00%", f"{down}"],
        ["up/bias", "4", "", "0", "4", "dense", f"{bias}"],
        ["up/kernel", "3 x 4", "7", "3.452", "6", "50.00%", f"{up}"],
        ["prunable weights: 2 x fewer", "20", "", "", "10", "50.00%", f"{down + up}"],
        ["all weights: 1.71 x fewer", "24", "", "", "14", "41.67%", f"{down + bias + up}"],
    ]
    assert {side for row in page.rows for side, _ in row[1:]} == {"right"}
    said = " ".join(page.words)
    assert "Sparsity by layer" in said
    assert "None of the 10 pruned weights is zero: these are the weights before apply_masks." in said


def test_samples_are_counted_where_they_were_measured():
    grams = jaxprune.calibrate_grams(fn, PARAMS, [jnp.ones((45, 3))])
    rows = Cells(grams._repr_html_()).texts
    assert rows == [
        ["path", "operation", "matrices", "inputs", "samples"],
        ["up/kernel", "dot", "1", "3", "45"],
        ["down/kernel", "dot", "1", "4", "45"],
    ]
    assert Cells((grams + grams)._repr_html_()).texts[1][-1] == "90"


def test_statistics_that_are_traced_or_shapes_alone_show_without_values():
    norms = jaxprune.calibrate_norms(fn, PARAMS, [X])
    seen = []

    @jax.jit
    def use(norms):
        seen.extend([repr(norms), str(norms)])
        return norms.sums

    use(norms)
    shapes = jax.eval_shape(lambda norms: norms, norms)
    for line, text in (seen, (repr(shapes), str(shapes))):
        assert line == "<Norms: of 2 parameters, 2 inputs of 3 to 4 features>"
        assert text.count("not at hand") == 2
    # In messages about trees, too, which say what is static.
    assert len(str(jax.tree.structure(norms))) < 200


def test_what_is_large_inside_is_one_line():
    kept = tuple(range(50_000))
    plan = structured.Plan({"w": {0: kept}}, {"w": (60_000, 3), "b": (7,)}, dropped=("b",))
    assert repr(plan) == "<Plan: 150,000 of 180,007 parameters stay; 1 array cut, 1 dropped, of 2>"
    shapes = {"cache": (None, 4)}
    assert repr(structured.Plan({"cache": {1: (0, 1)}}, shapes)) == "<Plan: 1 array cut, 0 dropped, of 1>"
    tree = {"a": jnp.ones((300, 300)), "b": [jnp.ones(9)] * 8}
    assert repr(Round(jnp.float32(1.5), tree, tree)) == "<Round: k = 1.5, masks and params of 9 arrays>"
    assert repr(Round({"a": 1.0}, tree, tree)) == "<Round: a k for each layer, masks and params of 9 arrays>"
    params = [{"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))} for _ in range(60)]

    def deep(params, x):
        for layer in params:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x

    graph = structured.trace(deep, params, jnp.ones((2, 4)))
    assert repr(graph) == "<Graph: 120 parameters, 60 groups, 60 blocks, 120 frozen axes>"
    assert len(Cells(graph._repr_html_()).rows) < 15


def test_names_are_text_in_html_and_in_a_repr():
    name = '<img src=x onerror="alert(1)">\x1b[31m&amp;\nnew'
    plan = structured.Plan({name: {0: (1,)}}, {name: (4,)})
    page = Cells(plan._repr_html_())
    assert page.texts[1][0] == name.replace("\x1b", r"\x1b") + "[0]"
    assert "img" not in page.tags
    saved = storage.Saved(name, 10, 20, ())
    assert repr(saved) == '<Saved: <img src=x onerror="alert(1)">\\x1b[31m&amp; new, 10 bytes, dense 20>'


def test_progress_in_a_file_or_a_notebook_has_no_codes(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a kernel sets it
    jaxprune.sensitivity(lambda params: 1.0, PARAMS, [0.5], rule=rules.layer_sparsity, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err
    assert "\x1b" not in printed.err


CELLS = [
    "import sys; sys.path.insert(0, %r)",
    "import jax.numpy as jnp, jaxprune, pathlib, warnings; from tests.test_displays import everything; warnings.simplefilter('ignore')",
    "import tempfile; found = everything(pathlib.Path(tempfile.mkdtemp()))",
]


@pytest.mark.slow
def test_a_notebook_shows_each_table_once():
    """In a real kernel: what one cell sends is one result with HTML, or one text without codes where it is printed."""
    manager = pytest.importorskip("jupyter_client.manager")
    # The tests' own way to draw is not what a kernel would choose.
    surroundings = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    kernel, client = manager.start_new_kernel(kernel_name="python3", env={**surroundings, "PYTHONWARNINGS": "ignore"})
    root = str(jaxprune.__path__[0]).removesuffix("/jaxprune")

    def sent(code: str) -> list[tuple[str, dict[str, Any]]]:
        messages: list[dict[str, Any]] = []
        client.execute_interactive(code, timeout=120, output_hook=messages.append)
        kinds = ("execute_result", "display_data", "stream", "error")
        return [(m["msg_type"], m["content"]) for m in messages if m["msg_type"] in kinds]

    try:
        for code in (CELLS[0] % root, *CELLS[1:]):
            assert sent(code) == []
        names = ["Summary", "Sites", "Norms", "Grams", "Graph", "Plan", "Verification", "Saved", "FileOverview"]
        for name in (*names, "Sensitivity", "Strength"):
            ((kind, content),) = sent(f"found[{name!r}]")
            assert kind == "execute_result", name
            assert content["data"]["text/html"].count("<table") == (2 if name == "Graph" else 1)
            assert len(content["data"]["text/plain"].splitlines()) == 1
            ((kind, content),) = sent(f"found[{name!r}].table(full=True)")
            assert kind == "execute_result", name
            assert "\x1b" not in "".join(content["data"].values())
            printed = sent(f"print(found[{name!r}])")
            assert {kind for kind, _ in printed} == {"stream"}, name
            text = "".join(content["text"] for _, content in printed)
            assert "\x1b" not in text
            assert text.count("┏") == (2 if name == "Graph" else 1)
        ((kind, content),) = sent("from jaxprune import plot; plot.weights(jnp.arange(9.0), 4.0);")
        assert kind == "display_data"
        assert "image/png" in content["data"]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
