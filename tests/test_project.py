"""What the project says of itself in several places is the same in all of them."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_that_of_the_citation_the_changelog_and_the_package():
    version = PROJECT["version"]
    assert importlib.metadata.version("jaxprune") == version
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [version]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


def test_pythons_of_the_classifiers_are_those_that_are_checked():
    named = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    workflow = (ROOT / ".github/workflows/check.yml").read_text()
    assert set(re.findall(r'python-version: "(.+)"', workflow)) == named
    assert PROJECT["requires-python"] == f">={min(named)}"


def test_every_dependency_has_a_lowest_version_which_ci_lowest_installs():
    needed = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    assert all(re.search(r">=\d", line) for line in needed if not line.startswith("jaxprune["))
