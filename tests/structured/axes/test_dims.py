"""Terms of axes: unification by hand, and against NumPy, which moves the same elements about."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.structured._axes._dims import (
    UNIT,
    Cat,
    Prod,
    Var,
    concatenation,
    cut,
    describe,
    freeze,
    fresh,
    kept_indices,
    kept_size,
    leaves,
    positions,
    product,
    resolve,
    size,
    split_kept,
    unify,
)
from jaxprune.structured._axes._layout import reshaped
from jaxprune.structured._axes._reasons import SINGLE


def test_variables_bind_and_the_older_one_stays():
    a, b = Var(4), Var(4)
    unify(b, a, "equal")
    assert resolve(b) is resolve(a) is a


def test_a_reason_spreads_and_the_first_one_stays():
    a, b, c = Var(4, "input"), Var(4), Var(4, "output")
    unify(a, b, "equal")
    unify(b, c, "equal")
    assert [leaf.reason for leaf in leaves(b)] == ["input"]
    whole = Var(6, "an output")
    unify(whole, product([Var(2), Var(3)]), "reshape")
    assert [(leaf.size, leaf.reason) for leaf in leaves(whole)] == [(2, "an output"), (3, "an output")]


def test_axes_of_one_element_say_nothing():
    assert fresh(1) is UNIT
    assert describe(product([UNIT, Var(3), UNIT])) == "3"
    token = concatenation([UNIT, Var(4)])
    assert describe(token) == "[1, 4]"
    assert [leaf.reason for leaf in leaves(token)] == [SINGLE, None]


def test_concatenations_take_the_common_refinement():
    a, b = Var(6), Var(6)
    unify(concatenation([a, b]), concatenation([Var(4), Var(8)]), "concatenate")
    assert describe(concatenation([a, b])) == "[4, 2, 6]"
    assert describe(a) == "[4, 2]"
    assert describe(b) == "6"


@pytest.mark.parametrize(
    ("left", "right", "both"),
    [
        ((8, 2), (4, 4), "4 x 2 x 2"),
        ((2, 3, 4), (6, 4), "2 x 3 x 4"),
        ((4, 2), (2, 4), "2 x 2 x 2"),
    ],
)
def test_products_align_from_the_inner_side(left: tuple[int, ...], right: tuple[int, ...], both: str):
    a, b = (product([Var(n) for n in sizes]) for sizes in (left, right))
    unify(a, b, "reshape")
    assert describe(a) == describe(b) == both
    assert [leaf.reason for leaf in leaves(a)] == [None] * len(list(leaves(a)))


def test_products_that_do_not_align_are_frozen():
    a, b = product([Var(4), Var(6)]), product([Var(6), Var(4)])
    unify(a, b, "reshape")
    reasons = {leaf.reason for dim in (a, b) for leaf in leaves(dim)}
    assert all(reason is not None and "reshape" in reason for reason in reasons)


def test_a_product_distributes_over_a_concatenation():
    q, k, v = Var(8), Var(8), Var(8)
    three, heads, dims = Var(3), Var(2), Var(4)
    unify(concatenation([q, k, v]), product([three, heads, dims]), "reshape")
    assert describe(q) == describe(k) == describe(v) == "2 x 4"
    assert [list(leaves(x)) for x in (q, k, v)] == [[heads, dims]] * 3
    assert {leaf.reason for leaf in leaves(three)} == {SINGLE}


def test_a_product_over_parts_that_do_not_fit_is_frozen():
    a, b = concatenation([Var(5), Var(7)]), product([Var(3), Var(4)])
    unify(a, b, "reshape")
    assert all(leaf.reason is not None for dim in (a, b) for leaf in leaves(dim))


def test_sizes_must_agree():
    with pytest.raises(ValueError, match=r"add: axes of 3 and 4 elements"):
        unify(Var(3), Var(4), "add")


def test_cutting_within_a_factor_is_refused():
    assert cut(product([Var(3), Var(4)]), 6) is None
    first, second = cut(product([Var(3), Var(4)]), 8)
    assert (describe(first), describe(second)) == ("2 x 4", "4")


def test_kept_elements_by_hand():
    heads, dims, other = Var(3), Var(2), Var(4)
    axis = concatenation([product([heads, dims]), other])
    kept = {heads: np.array([0, 2]), other: np.array([3])}
    assert kept_indices(axis, kept).tolist() == [0, 1, 4, 5, 9]
    assert kept_size(axis, {heads: 2, other: 1}) == 5
    assert positions(axis, heads).tolist() == [0, 0, 1, 1, 2, 2, -1, -1, -1, -1]
    assert positions(axis, dims).tolist() == [0, 1, 0, 1, 0, 1, -1, -1, -1, -1]
    found: dict[Var, np.ndarray] = {}
    assert split_kept(axis, np.array([0, 1, 4, 5, 9]), found)
    assert {var: indices.tolist() for var, indices in found.items()} == {heads: [0, 2], dims: [0, 1], other: [3]}
    # One head whole, half of another one: no choice of heads and dimensions.
    assert not split_kept(axis, np.array([0, 1, 2, 9]), {})


@st.composite
def shapes_of(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape = []
    while total > 1:
        factor = draw(st.sampled_from([n for n in range(2, total + 1) if total % n == 0]))
        shape.append(factor)
        total //= factor
    return tuple(draw(st.permutations(shape))) or (1,)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_layouts_agree_with_numpy(data: st.DataObject):
    """Whatever moves the elements of an array moves those that stay to where the terms say they stay."""
    sources = []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes_of(24))
        sources.append((np.arange(24).reshape(shape) + 100 * len(sources), [fresh(n) for n in shape]))
    pool = list(sources)
    moves = []
    for _ in range(data.draw(st.integers(1, 6))):
        array, dims = pool[data.draw(st.integers(0, len(pool) - 1))]
        kind = data.draw(st.sampled_from(["reshape", "transpose", "concatenate", "split"]))
        if kind == "reshape":
            shape = data.draw(shapes_of(array.size))
            pool.append((array.reshape(shape), reshaped(dims, shape, "reshape")))
            moves.append((kind, array.shape, shape))
        elif kind == "transpose":
            order = data.draw(st.permutations(range(array.ndim)))
            pool.append((array.transpose(order), [dims[axis] for axis in order]))
        elif kind == "concatenate":
            other, other_dims = pool[data.draw(st.integers(0, len(pool) - 1))]
            axis = data.draw(st.integers(0, array.ndim - 1))
            rest = lambda shape: shape[:axis] + shape[axis + 1 :]  # noqa: E731
            if other.ndim != array.ndim or rest(other.shape) != rest(array.shape) or array.size + other.size > 200:
                continue
            for i in range(array.ndim):
                if i != axis and array.shape[i] != 1:
                    unify(dims[i], other_dims[i], "concatenate")
            joined = list(dims)
            joined[axis] = concatenation([dims[axis], other_dims[axis]])
            pool.append((np.concatenate([array, other], axis), joined))
        else:
            axis = data.draw(st.integers(0, array.ndim - 1))
            if array.shape[axis] < 2:
                continue
            at = data.draw(st.integers(1, array.shape[axis] - 1))
            parts = [fresh(at), fresh(array.shape[axis] - at)]
            unify(dims[axis], concatenation(parts), "split")
            for piece, part in zip(np.split(array, [at], axis), parts, strict=True):
                pool.append((piece, [*dims[:axis], part, *dims[axis + 1 :]]))
    free = sorted(
        {leaf for _, dims in pool for dim in dims for leaf in leaves(dim) if leaf.reason is None},
        key=lambda leaf: leaf.number,
    )
    kept = {}
    for leaf in free:
        chosen = data.draw(st.sets(st.integers(0, leaf.size - 1), min_size=1))
        kept[leaf] = np.array(sorted(chosen))
    # Elements stay where every axis of every source keeps them; all arrays agree on which.
    for array, dims in pool:
        small = array[np.ix_(*(kept_indices(dim, kept) for dim in dims))]
        assert small.shape == tuple(kept_size(dim, {v: len(i) for v, i in kept.items()}) for dim in dims)
        assert math.prod(array.shape) == math.prod(map(size, dims))
    alive = {
        element
        for array, dims in sources
        for element in array[np.ix_(*(kept_indices(dim, kept) for dim in dims))].reshape(-1).tolist()
    }
    for array, dims in pool:
        small = array[np.ix_(*(kept_indices(dim, kept) for dim in dims))]
        assert small.reshape(-1).tolist() == [e for e in array.reshape(-1).tolist() if e in alive]


def test_terms_are_flat():
    a, b = Var(2), Var(3)
    outer = product([product([a, b]), Var(2)])
    assert isinstance(outer, Prod)
    assert len(outer.factors) == 3
    joined = concatenation([concatenation([a, b]), Var(2)])
    assert isinstance(joined, Cat)
    assert len(joined.parts) == 3
    freeze(joined, "stays")
    assert (a.reason, b.reason) == ("stays", "stays")
