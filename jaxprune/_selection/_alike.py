"""One program for many arrays that are alike, so that a model of three hundred layers compiles like one of ten."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Fewer arrays of a kind than this are not worth a loop, which copies each of them once.
FEW = 8
# Branches of one choice.
_BRANCHES = 32
# The most numbers that one reduction sets apart.
_AT_ONCE = 64

# What is known of an array before the program runs; arrays of one kind have the same shapes and dtypes and are sharded
# alike.
Kind = Hashable


def groups(kinds: Sequence[Kind]) -> list[list[int]]:
    """The numbers of the arrays of each kind, in the order of first appearance; few of a kind are groups of one."""
    found: dict[Kind, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return [part for group in found.values() for part in ([group] if len(group) >= FEW else [[i] for i in group])]


def for_each(
    function: Callable[[int, jax.Array, Any], Any],
    arrays: Sequence[jax.Array],
    extras: Sequence[Any],
    kinds: Sequence[Kind],
) -> list[Any]:
    """Return ``[function(i, arrays[i], extras[i]) for i in ...]``, by one program for those of a kind.

    Args:
        function: takes the number of one array of the kind (by which what is static is looked up), an array, and what
            belongs to it; returns a tree of small arrays, whose shapes depend on the kind alone.
        arrays: of any shapes. One of a group is copied at a time.
        extras: a tree of small arrays for each; all of a kind are stacked.
        kinds: of the arrays; static.

    Returns:
        What the function returned for each array.
    """
    results: list[Any] = [None] * len(arrays)
    for group in groups(kinds):
        own = [arrays[i] for i in group]
        if len(group) == 1:
            results[group[0]] = function(group[0], own[0], extras[group[0]])
            continue
        belonging = jax.tree.map(lambda *entries: jnp.stack(entries), *(extras[i] for i in group))
        for i, found in zip(group, for_group(functools.partial(function, group[0]), own, belonging), strict=True):
            results[i] = found
    return results


def for_group(
    function: Callable[[jax.Array, Any], Any],
    arrays: Sequence[jax.Array],
    extras: Any,
    known: Callable[[jax.Array, Any], tuple[jax.Array, Any]] | None = None,
) -> list[Any]:
    """Return ``[function(arrays[i], extras[i]) for i in ...]`` for arrays of one kind, by one program.

    Args:
        function: of an array and what belongs to it; returns a tree of small arrays.
        arrays: of one kind. One is copied at a time.
        extras: a tree of small arrays with a first axis that numbers `arrays`.
        known: may tell the function's result without the array: returns whether it does, and the result. It is given any
            of the arrays, for its type. Then nothing is copied.

    Returns:
        What the function returned for each array.
    """

    def find(place: jax.Array, extra: Any) -> Any:
        def compute() -> Any:
            return function(pick(place, arrays), extra)

        if known is None:
            return compute()
        is_known, result = known(arrays[0], extra)
        return lax.cond(is_known, lambda: result, compute)

    def turn(carry: None, place_and_extra: tuple[jax.Array, Any]) -> tuple[None, tuple[jax.Array, Any]]:
        place, extra = place_and_extra
        found = find(place, extra)
        return carry, (place + hidden_zero(jax.tree.leaves(found)[0]), found)

    if len(arrays) == 1:
        return [find(jnp.int32(0), jax.tree.map(lambda rows: lax.index_in_dim(rows, 0, keepdims=False), extras))]
    _, (numbers, found) = lax.scan(turn, None, (jnp.arange(len(arrays), dtype=jnp.int32), extras))
    return [jax.tree.map(lambda rows, number=number: take_row(rows, number), found) for number in apart(numbers)]


def hidden_zero(array: jax.Array) -> jax.Array:
    """Return the int32 0 in a way that no compiler sees through, since it depends on what the program computes."""
    return jnp.minimum(jnp.sum(array == np.zeros((), array.dtype), dtype=jnp.int32), 0)


def pick(place: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
    """Return the array at a traced place, a copy."""
    if len(arrays) == 1:
        return arrays[0]
    # A tree of choices: every branch of one choice among all would take all of the arrays as its arguments.
    share = -(-len(arrays) // _BRANCHES)
    parts = [arrays[start : start + share] for start in range(0, len(arrays), share)]
    branches = [lambda part=part, start=i * share: pick(place - start, part) for i, part in enumerate(parts)]
    return lax.switch(place // share, branches)


def take_row(rows: jax.Array, number: jax.Array) -> jax.Array:
    """Return one row of a table."""
    return lax.dynamic_index_in_dim(rows, number, keepdims=False)


def apart(numbers: jax.Array) -> list[jax.Array]:
    """Return the entries of a vector of numbers unknown to the compiler as scalars.

    XLA's CPU compiler makes a kernel for every constant that it knows, such as the place that a slice begins at, but one
    for all slices that begin at a number it does not know. The results of a reduction are of that sort; slices would be
    constants.
    """
    size = numbers.shape[0]

    def reduced(numbers: jax.Array) -> list[jax.Array]:
        zero, places = np.zeros((), numbers.dtype), np.arange(size)
        found: list[jax.Array] = []
        for start in range(0, size, _AT_ONCE):
            chosen = tuple(jnp.where(places == i, numbers, zero) for i in range(start, min(start + _AT_ONCE, size)))
            found += lax.reduce(chosen, (zero,) * len(chosen), lambda a, b: tuple(map(lax.add, a, b)), (0,))
        return found

    def sliced(numbers: jax.Array) -> list[jax.Array]:
        return [lax.index_in_dim(numbers, i, keepdims=False) for i in range(size)]

    return lax.platform_dependent(numbers, cpu=reduced, default=sliced)
