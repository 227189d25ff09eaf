"""Tables for rich to print; imported by what prints when it prints."""

from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from jaxprune._printing import printable


class Table(RichTable):
    """A table of rich of which titles and cells are text: names are printed, never read as markup or control codes."""

    def __init__(self, *, title: str | None = None, caption: str | None = None, **options: Any) -> None:
        """Make an empty table."""
        super().__init__(
            title=None if title is None else _text(title, "table.title"),
            caption=None if caption is None else _text(caption, "table.caption"),
            **options,
        )

    def add_column(self, header: str = "", **options: Any) -> None:  # type: ignore[override]
        """Add a column."""
        super().add_column(_text(header), **options)

    def add_row(self, *cells: str, **options: Any) -> None:  # type: ignore[override]
        """Add a row."""
        super().add_row(*map(_text, cells), **options)


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)
