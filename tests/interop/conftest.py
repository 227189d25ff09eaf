"""Tests of other libraries, a folder for each environment that `.ci/interop` makes; elsewhere they are not collected."""

import importlib.util
from pathlib import Path

_HERE = Path(__file__).parent


def _is_missing(folder: Path) -> bool:
    """Whether what a folder's tests import first is not installed: the first line of its requirements, `# imports: name`."""
    first = (folder / "requirements.txt").read_text().partition("\n")[0]
    return any(importlib.util.find_spec(name) is None for name in first.removeprefix("# imports:").split())


collect_ignore = [path.parent.name for path in _HERE.glob("*/requirements.txt") if _is_missing(path.parent)]
