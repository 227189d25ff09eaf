"""The HTML page: self-contained, escaped, written whole or not at all; rendered by a browser where there is one."""

import html.parser
import os
import shutil
import struct
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

import jaxprune
from tests.support.curves import CURVES

PARAMS = {
    "a<b": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), jnp.float32), "bias": jnp.ones(8)},
    "c": {"kernel": jnp.ones((4, 4)).at[0].set(2.0)},
}
MASKS = jaxprune.make_masks(PARAMS, 0.9, rule=jaxprune.rules.layer_sparsity)
HISTORY = [{"step": 0, "sparsity": 0.0, "churn": 0.0}, {"step": 10, "sparsity": 0.5, "churn": 0.25}]


class Reader(html.parser.HTMLParser):
    """Collects the tags with their attributes, and the text of the cells."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.cells, self.text, self.rows = [], [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.rows += [[]] if tag == "tr" else []
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
            self.rows[-1][-1] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


@pytest.mark.slow
def test_the_page_shows_the_summary_and_loads_nothing(tmp_path):
    summary = jaxprune.report(tmp_path / "page.html", PARAMS, MASKS, sensitivity=CURVES, history=HISTORY)
    assert summary == jaxprune.summarize(PARAMS, MASKS)
    reader = read(tmp_path / "page.html")
    images = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 2 * 2 + 1 + 1  # two layers' weights and masks, sensitivity, churn
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    assert "a<b/kernel" in reader.cells
    for row in summary.rows:
        assert f"{row.kept:,}" in reader.cells
    assert "all together" in reader.cells
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b/kernel" in text
    assert summary.remarks[0].replace("<", "&lt;") in text


@pytest.mark.slow
def test_a_model_with_nan_has_a_page(tmp_path):
    params = {"kernel": jnp.array([[1.0, jnp.nan], [3.0, -2.0]])}
    masks = jaxprune.make_masks(params, 0.5, rule=jaxprune.rules.layer_sparsity)
    jaxprune.report(tmp_path / "page.html", params, masks)
    assert "kernel" in read(tmp_path / "page.html").cells


def test_without_anything_removed(tmp_path):
    whole = jaxprune.make_masks(PARAMS, 0.0)
    jaxprune.report(tmp_path / "page.html", PARAMS, whole, title="Nothing & all")
    assert "Nothing &amp; all" in (tmp_path / "page.html").read_text()
    assert "Weights and masks" not in (tmp_path / "page.html").read_text()


def test_a_failure_leaves_the_old_page(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    with pytest.raises(ValueError, match=r"params\['c'\]\['kernel'\]"):
        jaxprune.report(page, PARAMS, MASKS | {"c": {"kernel": jnp.ones(3, bool)}})
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
    with pytest.raises(FileNotFoundError):
        jaxprune.report(tmp_path / "nowhere" / "page.html", PARAMS, MASKS)


def shot(page, width, height, *options):
    """Return a picture of a page."""
    picture = page.with_suffix(".png")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    subprocess.run(
        [BROWSER, *options, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, f"--window-size={width},{height}",
         f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}", f"file://{page}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return picture


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.mark.slow
@in_a_browser
def test_a_browser_renders_it(tmp_path):
    jaxprune.report(tmp_path / "page.html", PARAMS, MASKS, sensitivity=CURVES)
    picture = shot(tmp_path / "page.html", 1300, 4000)
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (1300, 4000)
    pixels = imread(picture)[..., :3]
    assert pixels[3, 3].tolist() == [1, 1, 1]
    # The page's blue (bars and histograms) and the grey of what is removed are there.
    assert (np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02).mean() > 0.002
    assert (np.abs(pixels - 0xBB / 255).max(-1) < 0.02).mean() > 0.001


@pytest.mark.slow
@in_a_browser
def test_in_a_narrow_and_dark_window_tables_scroll_and_the_page_does_not(tmp_path):
    """A frame of 400 pixels, as a telephone has; what is wider than it would make the frame scroll sideways."""
    params = {f"encoder/layers_{i}/self_attention/query": PARAMS["a<b"] for i in range(3)}
    masks = {name: MASKS["a<b"] for name in params}
    jaxprune.report(tmp_path / "page.html", params, masks, history=HISTORY, title="A long-title " * 9)
    (tmp_path / "frame.html").write_text(
        "<body style='margin:0;background:#f00'><iframe id=f src=page.html style='border:0;width:400px;height:900px'></iframe>"
        "<script>onload = () => { const page = f.contentDocument.documentElement;"
        " if (page.scrollWidth <= 400) document.body.style.background = '#0f0'; }</script>"
    )
    options = ["--blink-settings=preferredColorScheme=0", "--allow-file-access-from-files"]
    pixels = imread(shot(tmp_path / "frame.html", 600, 900, *options))[..., :3]
    assert pixels[450, 550].tolist() == [0, 1, 0]
    np.testing.assert_allclose(pixels[3, 3] * 255, [0x14, 0x17, 0x1C], atol=1)


def layers_of(count):
    """Layers of 64 weights, of which every other one loses half and the others three quarters."""
    weights = jnp.arange(1.0, 65.0).reshape(8, 8)
    params = {f"layers_{i}": {"kernel": weights, "bias": jnp.ones(8)} for i in range(count)}
    masks = {
        f"layers_{i}": {"kernel": weights > (48 if i % 2 else 32), "bias": jnp.ones(8, bool)} for i in range(count)
    }
    return params, masks


@pytest.mark.slow
def test_the_page_says_where_the_weights_went(tmp_path):
    params, masks = layers_of(4)
    jaxprune.report(tmp_path / "page.html", params, masks)
    page = read(tmp_path / "page.html")
    assert "Between 50.00% (layers_0/kernel) and 75.00% (layers_1/kernel) of a layer are removed." in page.text
    # 32, 16, 32 and 16 stay.
    assert "Half of what stays is in 2 of 4 layers: layers_0/kernel, layers_2/kernel." in page.text
    widths = [attributes["style"] for tag, attributes in page.tags if tag == "i"]
    assert sorted(set(widths)) == ["width:25.000%", "width:50.000%", "width:75.000%"]
    assert "32 of 64 stay, 50.0% removed" in page.text
    equal = {name: masks["layers_0"] for name in masks}
    jaxprune.report(tmp_path / "page.html", params, equal)
    assert "Every layer lost about the same share: 50.00%." in read(tmp_path / "page.html").text


@pytest.mark.slow
def test_many_layers_share_a_bar_and_have_a_row_each(tmp_path):
    params, masks = layers_of(30)
    jaxprune.report(tmp_path / "page.html", params, masks)
    page = read(tmp_path / "page.html")
    assert [a["class"] for tag, a in page.tags if tag == "div" and a.get("class") == "bar"] == ["bar"]
    assert "layers_*/kernel x 30" in page.text
    assert "720 of 1.92 k stay, 62.5% removed" in page.text
    rows = [row[0] for row in page.rows if len(row) == 10]
    assert [name for name in rows if name.endswith("kernel")] == [f"layers_{i}/kernel" for i in range(30)]


@pytest.mark.slow
def test_the_page_says_which_layers_hurt_at_what_was_removed_here(tmp_path):
    params = {name: {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)} for name in "ab"}
    masks = {"a": {"kernel": params["a"]["kernel"] > 60}, "b": {"kernel": params["b"]["kernel"] > 95}}
    jaxprune.report(tmp_path / "page.html", params, masks, sensitivity=CURVES)
    page = read(tmp_path / "page.html")
    # a loses 60 %, halfway between the 40 % that cost 0.05 and the 80 % that cost 0.4; b loses 95 %, and up to 90 % were tried.
    assert ["a/kernel", "60.00%", "0.225", "0.50%"] in page.rows
    assert ["b/kernel", "95.00%", "beyond what was tried: 0.1", "50.00%"] in page.rows
    assert page.text.index("a/kernel, b/kernel cost more than 0.01 of the metric (dense 0.9)") > 0
    assert "0.225" in page.text.split("Where the weights went")[0]
    jaxprune.report(tmp_path / "page.html", params, masks)
    assert "Unknown: report is told by sensitivity=" in read(tmp_path / "page.html").text


@pytest.mark.slow
def test_the_page_says_what_it_costs(tmp_path):
    params, masks = layers_of(2)
    uses = {"layers_0/kernel": 10, "layers_1/kernel": 1}
    summary = jaxprune.report(tmp_path / "page.html", params, masks, uses=uses)
    page = read(tmp_path / "page.html")
    stored, small = (sum(getattr(row, name) for row in summary.rows) for name in ("stored_bytes", "int8_bytes"))
    assert ["dense arrays", "576", "1.00"] in page.rows
    assert ["kept values with a bitmask", f"{stored:,}", f"{576 / stored:.2f}"] in page.rows
    assert ["the same in eight bits", f"{small:,}", f"{576 / small:.2f}"] in page.rows
    assert ["with all weights", "704", "1.00"] in page.rows
    assert ["with the weights kept", "336", "2.10"] in page.rows  # 10 x 32 + 16
    assert next(row[-2:] for row in page.rows if row[0] == "layers_0/kernel") == ["640", "320"]
    jaxprune.report(tmp_path / "page.html", params, masks)
    assert "Multiply-accumulates are counted where report is told uses=." in read(tmp_path / "page.html").text


@pytest.mark.slow
def test_the_same_numbers_make_the_same_page(tmp_path):
    params, masks = layers_of(1)
    for name in ("a", "b"):
        jaxprune.report(tmp_path / name, params, masks)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_outputs_run_to_the_right_whoever_made_the_file(tmp_path):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    params = {
        "encoder.fc.weight": weights,
        "encoder.fc.kernel": weights,
        "ConvTranspose_0.kernel": weights.reshape(2, 2, 3, 8),
    }
    masks = jaxprune.make_masks(params, 0.5, rule=jaxprune.rules.layer_sparsity)
    jaxprune.report(tmp_path / "page.html", jaxprune.apply_masks(params, masks), masks)
    said = {attributes["alt"] for tag, attributes in read(tmp_path / "page.html").tags if tag == "img"}
    assert {text for text in said if "Mask" in text} == {
        "Mask of encoder.fc.weight, outputs (axis 0) to the right",
        "Mask of encoder.fc.kernel, outputs (axis 1) to the right",
        "Mask of ConvTranspose_0.kernel",
    }
