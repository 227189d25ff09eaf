"""Tables as HTML, for notebooks and the page: aligned, with the colours and the background of whatever shows them."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxprune._printing import printable

# By the words of a row's style: a notebook that drops style sheets keeps what an element says of itself.
_STYLES = {"dim": "opacity:.65", "bold": "font-weight:bold", "red": "color:#d55e00"}


class Line(NamedTuple):
    """A row: its cells, the words of its style (``"bold red"``), and whether a section begins with it."""

    cells: Sequence[str]
    style: str = ""
    begins: bool = False


def escaped(words: str) -> str:
    r"""Return a text as HTML that shows it as it is: no markup, no control codes; lines stay lines.

    >>> escaped("a<b>\x1b\nc")
    'a&lt;b&gt;\\x1b<br>c'
    """
    return html.escape(printable(words)).replace("\n", "<br>")


def table(
    heads: Sequence[str],
    lines: Iterable[Line],
    *,
    numbers: Sequence[bool],
    title: str | None = None,
    below: str | None = None,
) -> str:
    r"""Return a table, which scrolls within itself where the window is narrow.

    Args:
        heads: of the columns.
        lines: the rows.
        numbers: which columns stand to the right, digit below digit.
        title: above it.
        below: a text below it.

    >>> print(table(["layer", "kept"], [Line(["a<b", "3"])], numbers=[False, True]).replace("><", ">\n<"))
    <div style="overflow-x:auto">
    <table style="border-collapse:collapse;font-variant-numeric:tabular-nums">
    <thead>
    <tr>
    <th style="text-align:left;padding:.2em .6em;vertical-align:top">layer</th>
    <th style="text-align:right;padding:.2em .6em;vertical-align:top">kept</th>
    </tr>
    </thead>
    <tbody>
    <tr>
    <td style="text-align:left;padding:.2em .6em;vertical-align:top">a&lt;b</td>
    <td style="text-align:right;padding:.2em .6em;vertical-align:top">3</td>
    </tr>
    </tbody>
    </table>
    </div>
    """
    sides = [f"text-align:{'right' if number else 'left'};padding:.2em .6em;vertical-align:top" for number in numbers]
    head = "".join(f'<th style="{side}">{escaped(text)}</th>' for side, text in zip(sides, heads, strict=True))
    rows = []
    for line in lines:
        own = [_STYLES[word] for word in line.style.split()]
        own += ["border-top:1px solid"] if line.begins else []
        cells = zip(sides, line.cells, strict=True)
        rows.append(
            f"<tr{_style(own)}>"
            + "".join(f"<td{_style([side])}>{escaped(text)}</td>" for side, text in cells)
            + "</tr>"
        )
    above = "" if title is None else f'<p style="margin:.5em 0;font-weight:bold">{escaped(title)}</p>'
    said = "" if below is None else f'<p style="margin:.5em 0">{escaped(below)}</p>'
    return (
        f'{above}<div style="overflow-x:auto"><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{said}"
    )


def _style(parts: Sequence[str]) -> str:
    return f' style="{";".join(parts)}"' if parts else ""
