"""Terms that say what each element along an axis is, and unification: which axes must be cut alike.

An axis carries a term. A `Var` is an axis without known structure; unification binds it to another term. A `Prod` is a
row-major product of axes (heads times head size, a flattened image), a `Cat` a concatenation of axes one behind the
other (the fused projections of attention, a gated layer). Two axes with the same term hold the same elements in the
same order, so whatever is cut from one is cut from the other. Where two terms cannot be made one, both are frozen and
keep a reason: the structure is never guessed.
"""

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Union

import numpy as np

from jaxprune.structured._axes._reasons import SINGLE, only_renumbers, unaligned

Dim = Union["Var", "Prod", "Cat"]

_numbers = itertools.count()


class Var:
    """An axis without known structure.

    Attributes:
        size: its number of elements, at least 1.
        bound: the term it was found to be, if any.
        reason: why it must not be cut, if it must not.
        depth: whether a loop steps along it, so that its elements are layers and not channels.
        number: tells variables apart, and orders them by the time they were made.
    """

    __slots__ = ("bound", "depth", "number", "reason", "size")

    def __init__(self, size: int, reason: str | None = None, depth: bool = False) -> None:
        """Make a new axis."""
        self.size = size
        self.bound: Dim | None = None
        self.reason = reason
        self.depth = depth
        self.number = next(_numbers)

    def __repr__(self) -> str:
        """Show the number and the size."""
        return repr(resolve(self)) if self.bound else f"d{self.number}:{self.size}" + ("!" if self.reason else "")


class Prod:
    """A row-major product of axes, the outermost first; without factors, an axis of one element."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Dim]) -> None:
        """Make a product."""
        self.factors = tuple(factors)

    def __repr__(self) -> str:
        """Show the factors."""
        return "(" + " x ".join(map(repr, self.factors)) + ")" if self.factors else "1"


class Cat:
    """Axes one behind the other, at least two."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Dim]) -> None:
        """Make a concatenation."""
        self.parts = tuple(parts)

    def __repr__(self) -> str:
        """Show the parts."""
        return "[" + ", ".join(map(repr, self.parts)) + "]"


UNIT = Prod(())


def fresh(size: int, reason: str | None = None) -> Dim:
    """Return an axis of which nothing is known but its size."""
    return UNIT if size == 1 else Var(size, reason)


def product(factors: Sequence[Dim]) -> Dim:
    """Return the row-major product of axes; of one axis, the axis itself."""
    flat: list[Dim] = []
    for factor in map(resolve, factors):
        flat.extend(factor.factors if isinstance(factor, Prod) else (factor,) if size(factor) != 1 else ())
    return flat[0] if len(flat) == 1 else Prod(flat) if flat else UNIT


def concatenation(parts: Sequence[Dim]) -> Dim:
    """Return the concatenation of axes; an axis of one element becomes one that is frozen."""
    flat: list[Dim] = []
    for part in map(resolve, parts):
        if isinstance(part, Cat):
            flat.extend(part.parts)
        elif size(part) > 0:
            flat.append(_piece(1) if isinstance(part, Prod) and not part.factors else part)
    return flat[0] if len(flat) == 1 else Cat(flat)


def _piece(size: int, reason: str | None = None, depth: bool = False) -> Var:
    """Return a part of an axis; where it is one element, cutting it would leave nothing."""
    return Var(size, reason or (SINGLE if size == 1 else None), depth)


def resolve(dim: Dim) -> Dim:
    """Return what a term is known to be by now: its outermost form has no bound variable."""
    if isinstance(dim, Var):
        if dim.bound is not None:
            dim.bound = resolve(dim.bound)
        return dim.bound or dim
    if isinstance(dim, Prod):
        return product(dim.factors) if any(_is_bound(factor) for factor in dim.factors) else dim
    return concatenation(dim.parts) if any(_is_bound(part) for part in dim.parts) else dim


def _is_bound(dim: Dim) -> bool:
    return isinstance(dim, Var) and dim.bound is not None


def size(dim: Dim) -> int:
    """Count the elements along an axis, before anything is cut."""
    if isinstance(dim, Var):
        return dim.size
    if isinstance(dim, Prod):
        return math.prod(map(size, dim.factors))
    return sum(map(size, dim.parts))


def leaves(dim: Dim) -> Iterator[Var]:
    """Yield the variables of a term in order; one that occurs twice is yielded twice."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        yield dim
    else:
        for inner in dim.factors if isinstance(dim, Prod) else dim.parts:
            yield from leaves(inner)


def freeze(dim: Dim, reason: str) -> None:
    """Forbid to cut an axis; the first reason stays, but for one that whoever renumbers can meet."""
    for leaf in leaves(dim):
        if leaf.reason is None or (only_renumbers(leaf.reason) and not only_renumbers(reason)):
            leaf.reason = reason


def step_along(dim: Dim) -> None:
    """Take note that a loop steps along an axis: its elements are layers."""
    for leaf in leaves(dim):
        leaf.depth = True


def unify(a: Dim, b: Dim, reason: str) -> None:
    """Make two axes of the same size one, refining both; freeze both where that cannot be done.

    Args:
        a: an axis.
        b: another.
        reason: what relates them, for the message in case they are frozen.
    """
    if size(a) != size(b):
        raise ValueError(f"{reason}: axes of {size(a)} and {size(b)} elements cannot be one.")
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, Var):
        _bind(a, b)
    elif isinstance(b, Var):
        _bind(b, a)
    elif isinstance(a, Cat):
        _unify_cats(a, b, reason) if isinstance(b, Cat) else _distribute(b, a, reason)
    elif isinstance(b, Cat):
        _distribute(a, b, reason)
    else:
        _unify_products(a, b, reason)


def _bind(var: Var, to: Dim) -> None:
    if isinstance(to, Prod) and not to.factors:
        return  # both have one element: nothing can be cut
    if isinstance(to, Var) and to.number > var.number:
        var, to = to, var  # the older one stays, so that names do not depend on how late an axis was met
    if var.reason is not None:
        freeze(to, var.reason)
    if var.depth:
        step_along(to)
    var.bound = to


def _freeze_both(a: Dim, b: Dim, reason: str) -> None:
    why = reason + unaligned(describe(a), describe(b))
    freeze(a, why)
    freeze(b, why)


def describe(dim: Dim) -> str:
    """Write a term with sizes alone: ``8 x 2``, ``[4, 4, 8]``."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return str(dim.size)
    if isinstance(dim, Prod):
        return " x ".join(map(describe, dim.factors)) or "1"
    return "[" + ", ".join(map(describe, dim.parts)) + "]"


def _unify_cats(a: Cat, b: Cat, reason: str) -> None:
    left, right = list(a.parts), list(b.parts)
    while left and right:
        one, other = left.pop(0), right.pop(0)
        if size(one) > size(other):
            one, other, left, right = other, one, right, left
        if size(one) < size(other):
            halves = cut(other, size(one))
            if halves is None:
                _freeze_both(concatenation([one, *left]), concatenation([other, *right]), reason)
                return
            other, rest = halves
            right.insert(0, rest)
        unify(one, other, reason)


def cut(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """Split an axis into its first `at` elements and the others, 0 < at < size; None where its structure forbids it."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        first, second = (_piece(n, dim.reason, dim.depth) for n in (at, dim.size - at))
        dim.bound = Cat((first, second))
        return first, second
    if isinstance(dim, Prod):
        outer, inner = dim.factors[0], product(dim.factors[1:])
        if at % size(inner):
            return None
        halves = cut(outer, at // size(inner))
        if halves is None:
            return None
        return product([halves[0], inner]), product([halves[1], inner])
    before: list[Dim] = []
    for number, part in enumerate(dim.parts):
        if at < size(part):
            halves = cut(part, at) if at else None
            if at and halves is None:
                return None
            first_half, second_half = ([halves[0]], [halves[1]]) if halves else ([], [part])
            return (
                concatenation([*before, *first_half]),
                concatenation([*second_half, *dim.parts[number + 1 :]]),
            )
        at -= size(part)
        before.append(part)
    raise AssertionError("the cut lies within the axis")


def _unify_products(a: Prod, b: Prod, reason: str) -> None:
    """Align from the inner side: the larger of two factors is a product of which the smaller one is the inner part."""
    left, right = list(a.factors), list(b.factors)
    while left and right:
        one, other = resolve(left.pop()), resolve(right.pop())
        if isinstance(one, Prod) or isinstance(other, Prod):
            left.extend(one.factors if isinstance(one, Prod) else (one,))
            right.extend(other.factors if isinstance(other, Prod) else (other,))
            continue
        if size(one) < size(other):
            one, other, left, right = other, one, right, left
        if size(one) == size(other):
            unify(one, other, reason)
        elif size(one) % size(other) == 0:
            outer = Var(size(one) // size(other))
            unify(one, product([outer, other]), reason)
            left.append(outer)
        else:
            _freeze_both(product([*left, one]), product([*right, other]), reason)
            return


def _distribute(a: Prod, b: Cat, reason: str) -> None:
    """Make a product and a concatenation one: each part is a piece of the outer factors times the inner ones."""
    for split in range(1, len(a.factors)):
        inner = product(a.factors[split:])
        if all(size(part) % size(inner) == 0 for part in b.parts):
            pieces = [_piece(size(part) // size(inner)) for part in b.parts]
            unify(product(a.factors[:split]), concatenation(pieces), reason)
            for piece, part in zip(pieces, b.parts, strict=True):
                unify(part, product([piece, inner]), reason)
            return
    _freeze_both(a, b, reason)


# ---- what stays of an axis

# For some variables the elements that stay, in rising order; of all others everything stays.
Kept = Mapping[Var, np.ndarray]


def kept_size(dim: Dim, sizes: Mapping[Var, Any]) -> Any:
    """Count the elements of an axis whose variables have other sizes than at first; sizes may be symbolic."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return sizes.get(dim, dim.size)
    if isinstance(dim, Prod):
        return math.prod(kept_size(factor, sizes) for factor in dim.factors)
    return sum(kept_size(part, sizes) for part in dim.parts)


def kept_indices(dim: Dim, kept: Kept) -> np.ndarray:
    """Return the elements of an axis that stay, in rising order."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return kept[dim] if dim in kept else np.arange(dim.size)
    if isinstance(dim, Prod):
        found = np.zeros(1, np.int64)
        for factor in dim.factors:
            found = (found[:, None] * size(factor) + kept_indices(factor, kept)).reshape(-1)
        return found
    starts = np.cumsum([0, *map(size, dim.parts)])
    return np.concatenate([start + kept_indices(part, kept) for start, part in zip(starts, dim.parts, strict=False)])


def is_cut(dim: Dim, kept: Container[Any]) -> bool:
    """Whether anything is cut from an axis."""
    return any(leaf in kept for leaf in leaves(dim))


def positions(dim: Dim, var: Var) -> np.ndarray:
    """Return for each element of an axis the element of a variable it belongs to, or -1.

    Where a variable stands in a product twice, the outer one counts.
    """
    dim = resolve(dim)
    if isinstance(dim, Var):
        return np.arange(dim.size) if dim is var else np.full(dim.size, -1)
    if isinstance(dim, Cat):
        return np.concatenate([positions(part, var) for part in dim.parts])
    found = np.full(1, -1)
    for factor in dim.factors:
        inner = positions(factor, var)
        found = np.where(found[:, None] >= 0, found[:, None], inner).reshape(-1)
    return found


def split_kept(dim: Dim, indices: np.ndarray, found: dict[Var, np.ndarray]) -> bool:
    """Find the elements of each variable that stay from those of the axis; False where no choice gives them.

    Args:
        dim: the axis.
        indices: its elements that stay.
        found: receives the elements by variable.
    """
    dim = resolve(dim)
    indices = np.unique(indices)
    if isinstance(dim, Var):
        known = found.setdefault(dim, indices)
        return np.array_equal(known, indices)
    if isinstance(dim, Cat):
        start = 0
        for part in dim.parts:
            end = start + size(part)
            if not split_kept(part, indices[(start <= indices) & (indices < end)] - start, found):
                return False
            start = end
        return True
    digits = np.unravel_index(indices, [size(factor) for factor in dim.factors])
    if math.prod(len(np.unique(digit)) for digit in digits) != len(indices):
        return False
    return all(split_kept(factor, digit, found) for factor, digit in zip(dim.factors, digits, strict=True))
