"""The HTML page: self-contained, escaped, written whole or not at all; rendered by a browser where there is one."""

import html.parser
import os
import shutil
import struct
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

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
        self.tags, self.open, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


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
    assert len(images) == 1 + 2 + 1 + 1  # sparsity, two layers, sensitivity, churn
    assert all(source.startswith("data:image/png;base64,") for source in images)
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


@pytest.mark.slow
def test_a_browser_renders_it(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    jaxprune.report(tmp_path / "page.html", PARAMS, MASKS, sensitivity=CURVES)
    picture = tmp_path / "page.png"
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet, "--window-size=1300,2000",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", f"file://{tmp_path / 'page.html'}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1300, 2000)
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    # The page's blue (bars and histograms) and the grey of what is removed are there.
    assert (np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02).mean() > 0.002
    assert (np.abs(pixels - 0xBB / 255).max(-1) < 0.02).mean() > 0.001


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
    assert {text for text in said if "mask" in text} == {
        "Weights and mask of encoder.fc.weight, outputs (axis 0) to the right",
        "Weights and mask of encoder.fc.kernel, outputs (axis 1) to the right",
        "Weights and mask of ConvTranspose_0.kernel",
    }
