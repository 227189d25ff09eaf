"""Reading back what was written as JSON."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def read_json(text: str, names: Sequence[str], title: str) -> Mapping[str, Any]:
    """Read an object that a method `to_json` wrote, with these names in it."""
    found = None
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(text)
    if not isinstance(found, dict) or not set(names) <= set(found):
        raise ValueError(
            f"{title}.from_json reads what {title}.to_json wrote, a JSON object with {', '.join(names)}; got {text[:60]!r}."
        )
    return found
