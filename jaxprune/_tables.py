"""Tables for rich to print; imported by what prints when it prints."""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from jaxprune import _html
from jaxprune._printing import folded, folded_lines, printable

# What is said below a table of which rows were folded.
_LEGEND = "x n: n rows in one, numbers as min, median, max; each by table(full=True) or --full"

_NARROW = 12  # columns of a terminal, the least that names are given


class Printed:
    """Something of rich that is a text, too, and HTML in a notebook."""

    def __str__(self) -> str:
        """Return what rich prints as plain text, also in a notebook, where rich would show it by itself."""
        console = Console(file=io.StringIO(), width=120, color_system=None, force_jupyter=False, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def to_html(self) -> str:
        """Return it as HTML."""
        raise NotImplementedError

    def _repr_mimebundle_(self, include: Sequence[str], exclude: Sequence[str], **asked: Any) -> dict[str, str]:
        """Return what a notebook shows, in place of rich's own: lines drawn with characters, and codes of a terminal."""
        return {"text/plain": str(self), "text/html": self.to_html()}


class Table(Printed, RichTable):
    """A table of rich of which titles and cells are text: names are printed, never read as markup or control codes.

    Long sections are folded, unless it is to be full: numbered layers become one row (`folded`).
    """

    def __init__(
        self,
        *,
        title: str | None = None,
        caption: str | None = None,
        full: bool = False,
        legend: bool = True,
        **options: Any,
    ) -> None:
        """Make an empty table; the legend says what folded rows are."""
        self._waiting: list[tuple[str, list[str]]] = []
        self._full, self._caption, self._legend, self._merged = full, caption, legend, False
        super().__init__(title=None if title is None else _text(title, "table.title"), **options)
        self._show_caption()

    def add_column(self, header: str = "", **options: Any) -> None:  # type: ignore[override]
        """Add a column."""
        super().add_column(_text(header), **options)

    def add_row(self, *cells: str, style: str | None = None) -> None:  # type: ignore[override]
        """Add a row."""
        self._waiting.append((style or "", list(cells if self._full else map(folded_lines, cells))))

    def add_section(self) -> None:
        """End a section; rows are folded within one."""
        self._settle()
        super().add_section()

    def _settle(self) -> None:
        shown = self._waiting if self._full else folded(self._waiting)
        self._merged |= len(shown) < len(self._waiting)
        for style, cells in shown:
            super().add_row(*map(_text, cells), style=style or None)
        self._waiting = []
        self._show_caption()

    def _show_caption(self) -> None:
        lines = [] if self._caption is None else [self._caption if self._full else folded_lines(self._caption)]
        lines += [_LEGEND] if self._merged and self._legend else []
        self.caption = _text("\n".join(lines), "table.caption") if lines else None

    def to_html(self) -> str:
        """Return the table as HTML."""
        self._settle()
        heads, *columns = zip(*([column.header, *column.cells] for column in self.columns), strict=True)
        begins = [False, *(row.end_section for row in self.rows)]
        lines = [
            _html.Line([_plain(cell) for cell in cells], str(row.style or ""), first)
            for cells, row, first in zip(columns, self.rows, begins, strict=False)
        ]
        numbers = [column.justify == "right" for column in self.columns]
        title, below = (None if text is None else _plain(text) for text in (self.title, self.caption))
        return _html.table([_plain(head) for head in heads], lines, numbers=numbers, title=title, below=below)

    def widen(self, width: int) -> int:
        """Return a width, or the least at which no name is broken if that is more."""
        self._settle()
        least, most = self._widths()
        return max(width, self._frame() + most[0] + sum(least[1:]))

    def _frame(self) -> int:
        _, right, _, left = self.padding
        return len(self.columns) * (right + left + 1) + 1

    def _widths(self) -> tuple[list[int], list[int]]:
        """Return for each column the width that breaks between words, or numbers, and not within, and that which breaks nothing."""
        least, most = [], []
        for column in self.columns:
            numbers = column.justify == "right"
            least.append(
                max(_longest([column.header], r"\s"), _longest(column.cells, r"(?<=,) |\n" if numbers else r"\s"))
            )
            most.append(_longest([column.header, *column.cells], r"\n"))
        return least, most

    def _share_out(self, width: int) -> None:
        """Share out a width: no column breaks within words, or numbers, but that of names, which comes first."""
        spare = width - self._frame()
        least, most = self._widths()
        least[0] = min(most[0], _NARROW)
        spare -= sum(least)
        for column, low, high in zip(self.columns, least, most, strict=True):
            more = min(high - low, max(spare, 0))
            spare -= more
            # Where not even that is there, rich cuts short what is widest.
            column.width = low + more if spare >= 0 else None
        if spare < 0:
            self.columns[0].width = least[0]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table."""
        self._settle()
        self._share_out(options.max_width)
        yield from super().__rich_console__(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure the table."""
        self._settle()
        self._share_out(options.max_width)
        return super().__rich_measure__(console, options)


class Tables(Printed, Group):
    """Tables one below the other."""

    def to_html(self) -> str:
        """Return the tables as HTML."""
        return "".join(table.to_html() for table in self.renderables if isinstance(table, Printed))


def _longest(cells: Iterable[RenderableType], between: str) -> int:
    """Return how wide the widest piece of some texts is."""
    pieces = (piece for cell in cells if isinstance(cell, Text) for piece in re.split(between, cell.plain))
    return max(map(cell_len, pieces), default=0)


def _plain(text: Any) -> str:
    return text.plain if isinstance(text, Text) else str(text)


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)
