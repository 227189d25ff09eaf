"""The program of the page on frameworks, as it stands there."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[3]


def test_the_program_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs" / "how_to" / "frameworks.md").read_text()
    section = page.partition("## Keras 3")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec("".join(blocks), {})
