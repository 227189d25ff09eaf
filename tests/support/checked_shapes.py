"""What checks annotations while testing: beartype, for the functions that say shapes and for no others."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function that takes or returns arrays of a said shape; the others check by themselves what users pass."""
    hints = getattr(function, "__annotations__", {})
    return beartype(function) if any(map(_says_shape, hints.values())) else function


def _says_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_says_shape, getattr(hint, "__args__", ())))
