"""The index of the examples names every script, with what it shows, how long it takes and what it needs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text()
SCRIPTS = {path.name: path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))}
ROWS = dict(re.findall(r"^\| `(\w+\.py)` \|(.*)\|$", PAGE, re.MULTILINE))


def test_every_script_has_one_row_and_every_row_a_script() -> None:
    assert sorted(ROWS) == sorted(SCRIPTS)
    assert len(ROWS) == len(re.findall(r"^\| `", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_row_says_what_it_shows_how_long_it_takes_and_what_it_needs(name: str) -> None:
    shown, small, whole = (cell.strip() for cell in ROWS[name].split(" | "))
    assert len(shown) > 20
    times = re.compile(r"\d+ s|\d+ min|\d+ h|not measured|none")
    assert times.match(small), small
    assert times.match(whole), whole
    # What trains has a small size.
    code = SCRIPTS[name]
    trains = "options.parse" in code or '"--small"' in code or "settings = shrink_cnn.parse" in code
    assert trains == (small != "none")


def test_what_is_to_be_installed_is_what_the_script_asks_for() -> None:
    for name, code in SCRIPTS.items():
        for package in re.findall(r"pip install (?:--no-deps )?([\w-]+)", code.partition('"""\n\n')[0]):
            assert package in ROWS[name], (name, package)
