"""The documentation: every public name is in the reference, every block of code runs, every link leads somewhere."""

import argparse
import contextlib
import importlib.util
import io
import re
import warnings
from collections import Counter
from pathlib import Path

import jax
import pytest

import jaxprune
from jaxprune._cli._parser import _parsers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(page.relative_to(DOCS)): page.read_text()
    for page in sorted(DOCS.rglob("*.md"))
    if "_build" not in page.relative_to(DOCS).parts
}
# Notebooks are executed by the build.
NOTEBOOKS = {
    name for name, text in PAGES.items() if re.match(r"---\n(?:.*\n)*?(?:kernelspec:|file_format: mystnb)", text)
}


def blocks(text: str) -> list[tuple[str, str]]:
    """Blocks of code, and those of what the code before them prints, in order."""
    return re.findall(r"^```(python|output)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def public() -> set[str]:
    """The full names, as tests/test_public_names.py collects them."""
    spec = importlib.util.spec_from_file_location("public_names", ROOT / "tests/test_public_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return set(module.public())


def test_every_public_name_is_in_the_reference_once():
    listed = Counter(
        name
        for page, text in PAGES.items()
        if page.startswith("reference/")
        for name in re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)$", text, re.MULTILINE)
    )
    assert {name for name, times in listed.items() if times > 1} == set()
    assert set(listed) ^ public() == set()


def test_every_namespace_has_a_page_that_shows_it():
    for name in (*(name.split(".")[1] for name in public() if name.count(".") > 1), "jaxprune"):
        full = "jaxprune" if name == "jaxprune" else f"jaxprune.{name}"
        assert f".. automodule:: {full}\n" in PAGES[f"reference/{name}.md"]


def test_every_command_has_its_help_on_the_page():
    parser, commands = _parsers()
    assert isinstance(parser, argparse.ArgumentParser)
    shown = re.findall(r"^```\{command-help\} ?(\w*)$", PAGES["reference/command_line.md"], re.MULTILINE)
    assert shown == ["", *commands]


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if name not in NOTEBOOKS and blocks(text)])
def test_python_blocks_run_in_order_and_print_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of them save files
    names: dict = {"__name__": "__main__"}
    # As users have it, but that a page says what it warns of.
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", jaxprune.rules.PruningWarning)
        printed = ""
        for number, (kind, text) in enumerate(blocks(PAGES[page])):
            if kind == "output":
                assert [line.rstrip() for line in printed.splitlines()] == text.splitlines()
                continue
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"{page}, block {number}", "exec"), names)
            printed = out.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_what_is_there(page):
    text = re.sub(r"^(`{3,})(?!\{).*?^\1$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"^(?:```|:::)\{(?:include|image|figure|literalinclude)\} (\S+)$", text, re.MULTILINE)
    for target in targets:
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not file:
            continue
        found = DOCS / file[1:] if file.startswith("/") else (DOCS / page).parent / file
        assert found.exists(), f"{page} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text()), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_programs_that_are_named_are_there(page):
    file = ""
    for name, test in re.findall(r"`((?:[\w/]+/)?test_\w+\.py)?::(test_\w+)`", PAGES[page]):
        file = name or file
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"
    for module in re.findall(r"python -m (benchmarks\.\w+)", PAGES[page]):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for program in re.findall(r"python (examples/\w+\.py)", PAGES[page]):
        assert (ROOT / program).exists(), program


@pytest.mark.parametrize("page", PAGES)
def test_pages_that_a_toctree_names_are_there(page):
    for body in re.findall(r"^```\{toctree\}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE):
        entries = [line for line in body.splitlines() if line and not line.startswith(":")]
        missing = [
            entry for entry in entries if "*" not in entry and not (DOCS / page).parent.joinpath(f"{entry}.md").exists()
        ]
        assert not missing, page


def anchors(text: str) -> set[str]:
    """What MyST calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
