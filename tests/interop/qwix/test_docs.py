"""The program that the documentation shows for qwix runs."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, by qwix
PAGE = Path(__file__).parents[3] / "docs" / "how_to" / "store.md"


def test_the_program_of_the_page_runs():
    (program,) = re.findall(r"```\{code-block\} python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(program, str(PAGE), "exec"), {})
