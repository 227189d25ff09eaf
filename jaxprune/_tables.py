"""Tables for rich to print; imported by what prints when it prints."""

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from jaxprune._printing import folded, folded_lines, printable


class Table(RichTable):
    """A table of rich of which titles and cells are text: names are printed, never read as markup or control codes.

    Long sections are folded: numbered layers become one row (`folded`).
    """

    def __init__(self, *, title: str | None = None, caption: str | None = None, **options: Any) -> None:
        """Make an empty table."""
        self._waiting: list[tuple[str, list[str]]] = []
        super().__init__(
            title=None if title is None else _text(title, "table.title"),
            caption=None if caption is None else _text(folded_lines(caption), "table.caption"),
            **options,
        )

    def add_column(self, header: str = "", **options: Any) -> None:  # type: ignore[override]
        """Add a column."""
        super().add_column(_text(header), **options)

    def add_row(self, *cells: str, style: str | None = None) -> None:  # type: ignore[override]
        """Add a row."""
        self._waiting.append((style or "", list(map(folded_lines, cells))))

    def add_section(self) -> None:
        """End a section; rows are folded within one."""
        self._settle()
        super().add_section()

    def _settle(self) -> None:
        for style, cells in folded(self._waiting):
            super().add_row(*map(_text, cells), style=style or None)
        self._waiting = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table."""
        self._settle()
        yield from super().__rich_console__(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Measure the table."""
        self._settle()
        return super().__rich_measure__(console, options)


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)
