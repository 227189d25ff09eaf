"""The messages that the FAQ quotes are those that jaxprune raises, and what it says to do instead works."""

import doctest
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text()
SETUP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
ENTRIES = re.split(r"^###? ", PAGE, flags=re.MULTILINE)[1:]
# Messages are folded on the page.
FOLDED = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Print a warning as Python does, without the line of code."""
    print(f"{category.__name__}: {message}")


def test_every_message_is_raised_by_the_block_that_quotes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", show)
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(optionflags=FOLDED)
    said: list[str] = []
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("always")
        for block in SETUP:
            exec(block, names)
        for entry in ENTRIES:
            code = "\n".join(re.findall(r"```pycon\n(.*?)```", entry, re.DOTALL))
            test = doctest.DocTestParser().get_doctest(code, names, entry.partition("\n")[0], None, 0)
            runner.run(test, out=said.append, clear_globs=False)
            names = test.globs
    assert not runner.failures, "".join(said)
    assert runner.tries > 30


def test_every_entry_quotes_a_message_and_says_what_to_do() -> None:
    for entry in (entry for entry in ENTRIES if "```" in entry):
        title, *_ = entry.splitlines()
        assert re.search(r"^\S*(Error|Warning): ", entry, re.MULTILINE), title
        assert re.search(r"```\n\n\S", entry), title
