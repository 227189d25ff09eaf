"""Progress bars: on stderr, where they were asked for."""

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, progress: bool, total: int | None = None) -> Iterable[T]:
    """Return items, with a bar that moves as they are taken if `progress` is asked for; `what` stands before it.

    Their number is `total`, or their length where they have one.
    """
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    if total is None and isinstance(items, Sized):
        total = len(items)
    # In a notebook rich would ask for widgets, and a kernel says that it understands the codes of a terminal: it shows some.
    console = Console(stderr=True, force_jupyter=False, force_terminal=sys.stderr.isatty())
    return track(items, what, total=total, console=console)
