"""What results print as: a rich table, plain text, HTML for notebooks, and JSON that has no infinity."""

import io
import json
import math
from typing import Any


def printable(text: str) -> str:
    r"""Return a text with escapes in place of what a terminal would obey; lines stay.

    >>> printable("a\x1b[31mb\u202e")
    'a\\x1b[31mb\\u202e'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Printable:
    """A result with a method ``__rich__``: prints as that in a terminal, as text and in notebooks."""

    def __str__(self) -> str:
        """Return what rich prints as plain text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre style='line-height:normal'>{code}</pre>")


def as_json(value: Any) -> str:
    """Return plain dicts, lists and numbers as JSON text; JSON has no infinity and no NaN, they become null.

    >>> print(as_json({"kept": 3, "compression": float("inf")}))
    {
      "kept": 3,
      "compression": null
    }
    """
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
