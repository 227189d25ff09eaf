"""Progress bars: on stderr, where they were asked for."""

from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, progress: bool) -> Iterable[T]:
    """Return items, with a bar that moves as they are taken if `progress` is asked for; `what` stands before it."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sized) else None
    return track(items, what, total=total, console=Console(stderr=True))
