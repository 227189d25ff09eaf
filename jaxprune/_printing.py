"""What results print as: a rich table, plain text, HTML for notebooks, JSON that has no infinity; long lists folded."""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# Lists of more rows, and cells of more lines, are folded.
FEW_ROWS, FEW_LINES = 50, 12

# A number as tables write it: 1,024 or 0.05 or 1e-05 or 12.3 k.
_NUMBER = re.compile(r"[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?: [kMGT](?![A-Za-z]))?")
_DIGITS = re.compile(r"([0-9]+)")
_PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def printable(text: str) -> str:
    r"""Return a text with escapes in place of what a terminal would obey; lines stay.

    >>> printable("a\x1b[31mb\u202e")
    'a\\x1b[31mb\\u202e'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def some(names: Iterable[str]) -> str:
    """Return the first few of many names, for a message.

    >>> some(["a", "b"]), some("abcdefg")
    ('a, b', 'a, b, c, d and 3 more')
    """
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") or "nothing"


def many(count: int, what: str) -> str:
    """Return a number of things, in the plural unless it is one.

    >>> many(1, "layer"), many(1_200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def in_order(items: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
    """Return items with numbered layers by their numbers; what is not numbered stays where it comes first.

    Args:
        items: what is to be listed.
        name: of an item.

    >>> in_order(["in", "layer_0/w", "layer_0/b", "layer_10/w", "layer_10/b", "layer_2/w", "layer_2/b", "bias"])
    ['in', 'layer_0/w', 'layer_0/b', 'layer_2/w', 'layer_2/b', 'layer_10/w', 'layer_10/b', 'bias']
    """
    first: dict[Any, int] = {}

    def place(item: T) -> list[int]:
        pieces = _DIGITS.split(name(item))
        found: list[int] = []
        for number, piece in enumerate(pieces):
            above = tuple(found)
            found.append(int(piece) if number % 2 else first.setdefault((above[::2], piece), len(first)))
        return found

    return sorted(items, key=place)


def folded(rows: Iterable[tuple[str, Sequence[str]]], few: int = FEW_ROWS) -> list[tuple[str, list[str]]]:
    """Return rows of a table to read: as they are where they are few, else numbered layers in one row.

    Rows that are the same but for numbers become one, at the place of the first. A number in a name that differs becomes ``*``,
    another one the least, the median and the greatest of them; behind the first cell stands how many rows they were. Of what is
    then left beyond `few` the last row says how many there are more; rows of a style in bold are not left out before others. The
    whole is in what the table was made from.

    Args:
        rows: for each its style and its cells.
        few: so many rows stay as they are.

    >>> [cells for _, cells in folded([("", [f"layers/{i}/w", f"{i / 10:.1%} of 64"]) for i in range(12)], few=10)]
    [['layers/*/w x 12', '0.0, 50.0, 110.0% of 64']]
    """
    given = [(style, list(cells)) for style, cells in rows]
    if len(given) <= few:
        return given
    alike: dict[Any, list[list[str]]] = {}
    for style, cells in given:
        alike.setdefault((style, tuple(tuple(_NUMBER.split(cell)) for cell in cells)), []).append(cells)
    found = [(style, _merged(group, between)) for (style, between), group in alike.items()]
    if len(found) <= few:
        return found
    first = sorted(range(len(found)), key=lambda i: "bold" not in found[i][0])[: few - 1]
    rest = f"… {len(found) - len(first):,} more"
    return [*(found[i] for i in sorted(first)), ("", [rest, *[""] * (len(found[0][1]) - 1)])]


def alike(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return names that are the same but for numbers as one, each with the places of those that it stands for.

    >>> alike(["l/0/up", "head", "l/1/up"])
    [('l/*/up x 2', [0, 2]), ('head', [1])]
    """
    found: dict[tuple[str, ...], list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(tuple(_NUMBER.split(name)), []).append(place)
    return [(_merged([[names[i]] for i in places], [between])[0], places) for between, places in found.items()]


def folded_lines(text: str) -> str:
    """Return a text of many lines folded like the rows of a table."""
    lines = text.split("\n")
    return "\n".join(cells[0] for _, cells in folded((("", [line]) for line in lines), FEW_LINES))


def _merged(rows: Sequence[Sequence[str]], between: Sequence[Sequence[str]]) -> list[str]:
    """Merge rows that have the same texts between their numbers."""
    if len(rows) == 1:
        return list(rows[0])
    cells = []
    for number, texts in enumerate(between):
        values = zip(*(_NUMBER.findall(row[number]) for row in rows), strict=True)
        shown = [_one(of_rows, _in_name(texts[i], texts[i + 1], first=number == 0)) for i, of_rows in enumerate(values)]
        cells.append("".join(text + value for text, value in zip(texts, [*shown, ""], strict=True)))
    name, *below = cells[0].split("\n")
    return ["\n".join([f"{name} x {len(rows):,}", *below]), *cells[1:]]


def _in_name(before: str, after: str, *, first: bool) -> bool:
    """Whether a number between these texts is a part of a name; in the first cell any letter beside it says so."""
    word = re.split(r"\s", before)[-1] + re.split(r"\s", after)[0]
    return bool(re.search(r"[/_]" if not first else r"[/_]|[^\W\d]", word)) or bool(
        re.search(r"[^\W\d]\.|\.[^\W\d]", word)
    )


def _one(texts: Sequence[str], in_name: bool) -> str:
    """Write what some numbers are: one, many of a name, or how they lie."""
    low, *_, high = ordered = sorted(texts, key=_value)
    if _value(low) == _value(high):
        return low
    if in_name:
        return "*"
    return ", ".join([low, ordered[(len(ordered) - 1) // 2], high] if len(ordered) > 2 else ordered)


def _value(text: str) -> float:
    number, _, prefix = text.partition(" ")
    return float(number.replace(",", "")) * _PREFIXES.get(prefix, 1.0)


class Printable:
    """A result with a method ``table``: prints as that in a terminal, as text and in notebooks; its repr is one line.

    Numbered layers share a row where there are many; ``table(full=True)`` prints each.
    """

    def _in_short(self) -> str:
        """Return what it is in a few words, from what it knows without reading an array."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Return what it is in one line."""
        return f"<{type(self).__name__}: {printable(self._in_short())}>".replace("\n", " ")

    def table(self, *, full: bool = False) -> Any:
        """Return what is printed, with a row for each layer if that is to be `full`."""
        raise NotImplementedError

    def __rich__(self) -> Any:
        """Return the table for rich to print."""
        return self.table()

    def __str__(self) -> str:
        """Return what rich prints as plain text."""
        return str(self.table())

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        shown: str = self.table().to_html()
        return shown


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
