"""Steps of a function, and what passes between them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr._equations import Equation


@dataclasses.dataclass(eq=False)
class Value:
    """A result of a node, an input of the function, or a constant.

    Attributes:
        shape: its shape.
        node: whose result it is.
        array: what it is, once that is computed, or of an input.
        constant: what it is, where that is known before.
    """

    shape: tuple[Any, ...]
    node: "Node | None" = None
    array: Any = None
    constant: Any = None

    @property
    def is_known(self) -> bool:
        """Whether it is a constant."""
        return self.constant is not None

    def read(self) -> Any:
        """Return what it is."""
        return self.constant if self.is_known else self.array


class Node:
    """One step: an equation of the function, or what stands for several.

    Attributes:
        name: of its primitive, or of what it stands for.
        operands: what it is computed from.
        run: computes its results from those.
        results: what it gives.
        equation: whose step it is, if it is one's.
        shift: what is added to a product, a constant, where a later step was put into it.
    """

    def __init__(
        self,
        name: str,
        operands: Sequence[Value],
        run: Callable[[list[Any]], Sequence[Any]],
        shapes: Sequence[tuple[Any, ...]],
        equation: Equation | None = None,
        shift: np.ndarray | None = None,
    ) -> None:
        self.name, self.operands, self.run, self.equation, self.shift = name, operands, run, equation, shift
        self.results = [Value(shape, self) for shape in shapes]

    @property
    def keeps_dtype(self) -> bool:
        """Whether its first result has the dtype and the shape of its first operand."""
        if self.equation is None:
            return False
        before, after = (
            (self.equation.in_dtypes[0], self.equation.in_shapes[0]),
            (self.equation.out_dtypes[0], self.equation.out_shapes[0]),
        )
        return bool(before == after)

    def params(self, name: str) -> Any:
        """Return a parameter of its equation."""
        return None if self.equation is None else self.equation.params.get(name)


def known(array: Any) -> Value:
    """Return a constant; a NumPy array unless it is a PRNG key."""
    is_key = jnp.issubdtype(getattr(array, "dtype", np.float32), jax.dtypes.extended)
    constant = array if is_key else np.asarray(array)
    return Value(tuple(constant.shape), constant=constant)


def spread_constant(value: Value, rank: int) -> np.ndarray | None:
    """Return a constant that is broadcast, before it is: an array of this rank, or a scalar; None where it is no constant."""
    if value.is_known:
        array, places = value.constant, list(range(len(value.shape)))
    elif value.node is not None and value.node.name == "broadcast_in_dim" and value.node.operands[0].is_known:
        array, places = value.node.operands[0].constant, list(value.node.params("broadcast_dimensions"))
    else:
        return None
    if not isinstance(array, np.ndarray) or not array.shape:
        return array if isinstance(array, np.ndarray) else None
    shape = [1] * rank
    for place, n in zip(places, array.shape, strict=True):
        shape[place] = n
    return array.reshape(shape)
