"""One check, and one message, for arrays that are not those that were traced or planned."""

from collections.abc import Mapping
from typing import Any

from jaxprune._printing import some

Shapes = Mapping[str, tuple[Any, ...]]


def require_shapes(who: str, wanted: Shapes, where: str, found: Shapes, remedy: str) -> None:
    """Raise a ValueError unless all that is wanted is there, in the same shapes.

    Args:
        who: what it is that has the shapes wanted: ``"The plan"``.
        wanted: shapes by path, which may be symbolic.
        where: what is looked at: ``"params"``.
        found: its shapes by path; there may be more.
        remedy: a sentence that says what to do.
    """
    for path, shape in wanted.items():
        if path not in found:
            raise ValueError(
                f"{who} has {path} of shape {tuple(shape)}, which {where} does not have; it has {some(found)}. {remedy}"
            )
        if tuple(found[path]) != tuple(shape):
            raise ValueError(
                f"{who} has {path} of shape {tuple(shape)}; in {where} it has shape {tuple(found[path])}. {remedy}"
            )
