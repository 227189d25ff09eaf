import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune._selection import _counts, _largest, _order
from jaxprune._selection._largest import keep_largest, keep_largest_jointly
from tests.support.compilation import compiled_for_users

pytestmark = pytest.mark.optimised

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SUMS = (_largest._sum_in_one, _largest._sum_stacked, _largest._sum_each)
NAN, INF = np.nan, np.inf
# Few distinct numbers, so that ties are everywhere; every one of them is exact in every dtype.
NUMBERS = (0.0, -0.0, 1.0, -1.0, 1.0078125, 2.0**-14, -(2.0**-14), 6.0e4, INF, -INF, NAN)
examples = functools.partial(settings, deadline=None, derandomize=True)


def oracle(values, removed, magnitude, protected=None):
    """Sort stably by protection, NaN, value and position from the end, and remove the first."""
    values = np.asarray(values, np.float64).ravel()
    nan = np.isnan(values)
    ranks = np.where(nan, 0, np.abs(values) if magnitude else values)
    protected = np.zeros(values.size, bool) if protected is None else np.ravel(protected)
    order = np.lexsort((-np.arange(values.size), ranks, ~nan, protected))
    mask = np.ones(values.size, bool)
    mask[order[:removed]] = False
    return mask


def oracle_in_pools(values, removed, batch, magnitude):
    values = np.asarray(values, np.float64)
    pool = [axis for axis in range(values.ndim) if axis not in batch]
    moved = np.transpose(values, [*batch, *pool])
    rows = moved.reshape(-1, int(np.prod([values.shape[axis] for axis in pool], dtype=int)))
    removed = np.broadcast_to(removed, len(rows))
    masks = np.stack([oracle(row, n, magnitude) for row, n in zip(rows, removed, strict=True)])
    return np.transpose(masks.reshape(moved.shape), np.argsort([*batch, *pool]))


def draw(seed, shape, numbers=NUMBERS):
    return np.random.default_rng(seed).choice(numbers, shape)


@pytest.mark.parametrize(
    ("values", "removed", "magnitude", "kept"),
    [
        ([3, -1, 2, -4], 2, True, [1, 0, 0, 1]),
        ([3, -1, 2, -4], 2, False, [1, 0, 1, 0]),
        ([3, -1, 2, -4], 0, True, [1, 1, 1, 1]),
        ([3, -1, 2, -4], 4, True, [0, 0, 0, 0]),
        ([1, 1, 1, 1], 3, True, [1, 0, 0, 0]),
        ([2, 1, 2, 1], 3, True, [1, 0, 0, 0]),
        ([1, 2, 1, 2], 1, True, [1, 1, 0, 1]),
        ([0.0, -0.0, 0.0, -0.0], 1, False, [1, 1, 1, 0]),
        ([-INF, NAN, INF, 0], 1, False, [1, 0, 1, 1]),
        ([-INF, NAN, INF, 0], 2, False, [0, 0, 1, 1]),
        ([NAN, NAN, 0, NAN], 2, True, [1, 0, 1, 0]),
        ([INF, INF, INF, 1], 3, True, [1, 0, 0, 0]),
        ([1.4e-45, 0, 2.8e-45, -4.2e-45], 2, True, [0, 0, 1, 1]),
    ],
)
def test_by_hand(values, removed, magnitude, kept):
    mask = keep_largest(jnp.asarray(values, jnp.float32), _counts.from_int(removed), magnitude=magnitude)
    assert mask.tolist() == [bool(k) for k in kept]


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_stable_sort(dtype, magnitude):
    @examples(max_examples=40)
    @given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(1, len(NUMBERS)), st.booleans())
    def check(seed, removed, distinct, spread):
        rng = np.random.default_rng(seed)
        numbers = rng.normal(size=60) * 10.0 ** rng.integers(-6, 5) if spread else rng.permutation(NUMBERS)[:distinct]
        values = jnp.asarray(rng.choice(numbers, (3, 4, 5)), jnp.float32).astype(dtype)
        mask = keep_largest(values, _counts.from_int(removed), magnitude=magnitude)
        np.testing.assert_array_equal(mask.ravel(), oracle(values.astype(jnp.float32), removed, magnitude))

    check()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(0,), (0, 2), (0, 1, 2)])
def test_every_pool_by_itself(batch):
    shape = (4, 6, 5)
    pools = [shape[axis] for axis in batch]
    for seed in range(8):
        values = draw(seed, shape)
        removed = np.random.default_rng(seed).integers(0, 120 // int(np.prod(pools)) + 1, pools)
        count = _counts.Count(jnp.zeros(pools, jnp.uint32), jnp.asarray(removed, jnp.uint32))
        mask = keep_largest(jnp.asarray(values, jnp.float32), count, batch=batch, magnitude=False)
        np.testing.assert_array_equal(mask, oracle_in_pools(values, removed.ravel(), batch, False))


def oracle_jointly(values, removed, most, batches, magnitude):
    """Protect the largest of each pool, as many as it must keep, and sort the others of all pools together."""
    kept = [
        np.ones(v.shape, bool) if not v.size else oracle_in_pools(v, n, batch, magnitude)
        for v, n, batch in zip(values, most, batches, strict=True)
    ]
    order = [
        np.transpose(
            np.arange(v.size).reshape(v.shape), [*batch, *(a for a in range(v.ndim) if a not in batch)]
        ).ravel()
        for v, batch in zip(values, batches, strict=True)
    ]
    flat, flags = (
        np.concatenate([np.ravel(a)[o] for a, o in zip(arrays, order, strict=True)]) for arrays in (values, kept)
    )
    found = oracle(flat, removed, magnitude, flags)
    masks = []
    for v, o, part in zip(values, order, np.split(found, np.cumsum([v.size for v in values])[:-1]), strict=True):
        mask = np.ones(v.size, bool)
        mask[o] = part
        masks.append(mask.reshape(v.shape))
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [True, False])
def test_jointly_equals_stable_sort(magnitude):
    shapes = [(3, 4), (0, 2), (), (5,), (2, 3, 2)]
    batches = [(), (), (), (), (0,)]
    pools = [(12, 1), (0, 1), (1, 1), (5, 1), (6, 2)]

    @examples(max_examples=60)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.floats(0, 1))
    def check(seed, share_kept, share_removed):
        rng = np.random.default_rng(seed)
        values = [draw(rng, shape) for shape in shapes]
        most = [size - int(rng.binomial(size, share_kept)) for size, _ in pools]
        removed = round(share_removed * sum(n * depth for n, (_, depth) in zip(most, pools, strict=True)))
        masks = keep_largest_jointly(
            [jnp.asarray(v, jnp.float32) for v in values],
            _counts.from_int(removed),
            magnitude=magnitude,
            batches=batches,
            most=most,
        )
        for mask, expected in zip(masks, oracle_jointly(values, removed, most, batches, magnitude), strict=True):
            np.testing.assert_array_equal(mask, expected)

    check()


@pytest.mark.slow
def test_jointly_the_earlier_array_is_kept():
    ones = [jnp.ones(3), jnp.ones((2, 2)), jnp.ones(2)]
    masks = keep_largest_jointly(ones, _counts.from_int(4), magnitude=True)
    assert [mask.tolist() for mask in masks] == [[True] * 3, [[True, True], [False, False]], [False, False]]


@pytest.mark.slow
def test_jointly_in_the_common_dtype():
    # In float32, which bfloat16 and float16 promote to, 1.0078125 < 1.0087890625.
    arrays = [jnp.asarray([1.0078125, 3.0], jnp.bfloat16), jnp.asarray([1.0087890625, 2.0], jnp.float16)]
    masks = keep_largest_jointly(arrays, _counts.from_int(1), magnitude=True)
    assert [mask.tolist() for mask in masks] == [[False, True], [True, True]]


# Two kinds in turn, five arrays of each and one more of the first: two loops.
KINDS = [*["wide", "tall"] * 5, "wide"]


@pytest.mark.slow
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("batch", [(), (0,), (1,)])
def test_arrays_that_are_alike_jointly(sums, batch):
    shapes = [(4, 9) if kind == "wide" else (7, 3) for kind in KINDS]
    sizes = [np.prod([n for axis, n in enumerate(shape) if axis not in batch]) for shape in shapes]
    for least in (0, 1, 2):
        most = [int(size) - least for size in sizes]
        each = tuple(_largest.Joint(batch, n, kind) for n, kind in zip(most, KINDS, strict=True))
        select = jax.jit(functools.partial(_largest._select_jointly, magnitude=True, each=each, sums=sums))
        for seed in range(8):
            # Few values, so that ties run through several arrays of both kinds: the earlier array keeps its own. Some arrays
            # have small ones alone, so that they lose as much as they may.
            values = [
                draw(10 * seed + i, shape, [1.0, 2.0] if (i + seed) % 3 else [0.5, 0.25])
                for i, shape in enumerate(shapes)
            ]
            can_go = sum(n * np.prod(s) // size for n, s, size in zip(most, shapes, sizes, strict=True))
            removed = int((53 * seed + 5) % can_go)
            masks = select([jnp.asarray(v, jnp.float32) for v in values], _counts.from_int(removed))
            expected = oracle_jointly(values, removed, most, [batch] * len(KINDS), True)
            for mask, wanted in zip(masks, expected, strict=True):
                np.testing.assert_array_equal(mask, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sums", SUMS)
def test_arrays_that_are_alike_each(sums):
    values = [draw(i, (6, 8) if kind == "wide" else (9, 4), [1.0, 2.0, np.nan]) for i, kind in enumerate(KINDS)]
    counts = [i + 2 for i in range(len(KINDS))]
    for batch, limit in ((), 60), ((1,), 4):
        each = tuple(_largest.Each(batch, False, kind) for kind in KINDS)
        select = jax.jit(functools.partial(_largest._select_each, each=each, sums=sums))
        removed = [count if not batch else count % limit for count in counts]
        arrays = [jnp.asarray(v, jnp.float32) for v in values]
        masks = select(arrays, [_counts.from_int(count) for count in removed])
        for mask, array, count in zip(masks, values, removed, strict=True):
            np.testing.assert_array_equal(mask, oracle_in_pools(array, count, batch, False))


def test_a_program_does_not_grow_with_the_number_of_alike_arrays():
    def size(number):
        arrays = [jax.ShapeDtypeStruct((64, 32), jnp.float32)] * number
        removed = jax.eval_shape(lambda: _counts.from_int(0))
        each = (_largest.Each((), True, "alike"),) * number
        joint = (_largest.Joint((), 64 * 32 - 1, "alike"),) * number
        jointly = functools.partial(_largest._select_jointly, magnitude=True, each=joint, sums=_largest._sum_in_one)
        singly = functools.partial(_largest._select_each, each=each, sums=_largest._sum_in_one)
        programs = (
            jax.jit(jointly).lower(arrays, removed),
            jax.jit(singly).lower(arrays, [removed] * number),
        )
        return np.asarray([program.as_text().count("\n") for program in programs])

    # What is left for each array is its mask: 75 lines, where a search takes a thousand.
    assert (size(40) - size(20) <= 20 * 75).all()


@pytest.mark.slow
@pytest.mark.parametrize("sums", SUMS)
def test_all_ways_to_sum_agree(sums):
    most = (180, 77)
    joint = tuple(_largest.Joint((), n, i) for i, n in enumerate(most))
    jointly = jax.jit(functools.partial(_largest._select_jointly, magnitude=True, each=joint, sums=sums))
    each = (_largest.Each((0, 2), False),)
    in_columns = jax.jit(functools.partial(_largest._select_each, each=each, sums=sums))
    for seed in range(10):
        values = [draw(seed, (64, 3)), draw(seed + 100, (7, 11))]
        removed = 29 * seed % sum(most)
        masks = jointly([jnp.asarray(v, jnp.float32) for v in values], _counts.from_int(removed))
        for mask, expected in zip(masks, oracle_jointly(values, removed, most, [(), ()], True), strict=True):
            np.testing.assert_array_equal(mask, expected)

        stacked = draw(seed, (3, 20, 4))
        [mask] = in_columns([jnp.asarray(stacked, jnp.float32)], [_counts.from_int(2 * seed)])
        np.testing.assert_array_equal(mask, oracle_in_pools(stacked, 2 * seed, (0, 2), False))


def test_pools_across_rows_of_memory():
    # Large enough to be read in six blocks.
    values = draw(0, (48, 600))
    each = (_largest.Each((1,), True),)
    select = functools.partial(_largest._select_each, each=each, sums=_largest._sum_in_one)
    [mask] = jax.jit(select)([jnp.asarray(values, jnp.float32)], [_counts.from_int(30)])
    np.testing.assert_array_equal(mask, oracle_in_pools(values, 30, (1,), True))


def test_positions_of_several_words(monkeypatch):
    # As if a word could number no more than 12 entries: positions then take two words, or three.
    monkeypatch.setattr(_order, "MOST", 12)
    assert _order.words((2, 3, 2, 5), (0, 1, 2, 3)) == [(0, 1), (2, 3)]
    assert _order.words((2, 7, 2, 7), (0, 1, 2, 3)) == [(0,), (1,), (2,), (3,)]
    assert _order.words((), ()) == [()]
    for shapes in ([(2, 3, 2, 5), (4, 5)], [(2, 7, 2, 7)]):
        each = tuple(_largest.Joint((), int(np.prod(shape)), i) for i, shape in enumerate(shapes))
        select = jax.jit(
            functools.partial(_largest._select_jointly, magnitude=True, each=each, sums=_largest._sum_stacked)
        )
        for seed in range(10):
            values = [draw(seed, shape, [1.0, 2.0]) for shape in shapes]
            flat = np.concatenate([np.ravel(v) for v in values])
            removed = 11 * seed % flat.size
            masks = select([jnp.asarray(v, jnp.float32) for v in values], _counts.from_int(removed))
            np.testing.assert_array_equal(
                np.concatenate([np.ravel(mask) for mask in masks]), oracle(flat, removed, True)
            )


@pytest.mark.parametrize("shape", [(50_000, 50_000), (3_000_000_000,), (2, 70_000, 70_000)])
def test_more_entries_than_32_bits_number(shape):
    def select(values, k):
        return keep_largest(values, _counts.rounded(k, values.size), magnitude=True)

    mask = jax.eval_shape(select, jax.ShapeDtypeStruct(shape, jnp.float32), jnp.float32(0.9))
    assert (mask.shape, mask.dtype) == (shape, jnp.bool)


def test_an_axis_too_long_is_refused():
    with pytest.raises(ValueError, match=r"axis 0 of an array of shape \(5000000000,\)"):
        jax.eval_shape(
            lambda values: keep_largest(values, _counts.from_int(1), magnitude=True),
            jax.ShapeDtypeStruct((5_000_000_000,), jnp.float32),
        )


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="i(nt)?32"):
        keep_largest(jnp.arange(3), _counts.from_int(1), magnitude=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty(shape):
    assert keep_largest(jnp.zeros(shape), _counts.from_int(0), magnitude=True).shape == shape
    assert keep_largest_jointly([], _counts.from_int(0), magnitude=True) == []
    assert keep_largest_jointly([jnp.zeros(shape)], _counts.from_int(0), magnitude=True)[0].shape == shape


def test_a_single_entry():
    for removed in (0, 1):
        mask = keep_largest(jnp.asarray(2.0), _counts.from_int(removed), magnitude=True)
        assert (mask.shape, bool(mask)) == ((), not removed)


def test_more_removed_is_a_superset():
    values = jnp.asarray(np.round(np.random.default_rng(0).normal(size=(30, 40)), 1), jnp.float32)
    before = keep_largest(values, _counts.from_int(0), magnitude=False)
    for removed in range(0, 1201, 75):
        mask = keep_largest(values, _counts.from_int(removed), magnitude=False)
        assert int((~mask).sum()) == removed
        assert not bool(jnp.any(mask & ~before))
        before = mask


def test_permuting_distinct_values_permutes_the_mask():
    rng = np.random.default_rng(0)
    values = rng.permutation(1200).reshape(30, 40).astype(np.float32) - 600.5
    order = rng.permutation(1200)
    for removed in (1, 600, 1100):
        count = _counts.from_int(removed)
        mask = keep_largest(jnp.asarray(values), count, magnitude=False)
        permuted = keep_largest(jnp.asarray(values.ravel()[order].reshape(30, 40)), count, magnitude=False)
        np.testing.assert_array_equal(permuted.ravel(), mask.ravel()[order])


@pytest.mark.slow
def test_traced_counts():
    values = jnp.asarray(draw(0, (20, 30)), jnp.float32)

    def select(k):
        return keep_largest(values, _counts.rounded(k, values.size), magnitude=True)

    ks = jnp.asarray([0.0, 0.25, 0.5, 0.9, 1.0])
    each = np.stack([oracle(values, round(600 * float(k)), True).reshape(20, 30) for k in ks])
    np.testing.assert_array_equal(jax.vmap(select)(ks), each)
    np.testing.assert_array_equal(lax.scan(lambda carry, k: (carry, select(k)), 0, ks)[1], each)
    for k, mask in zip(ks, each, strict=True):
        np.testing.assert_array_equal(select(float(k)), mask)


def test_masks_let_gradients_through():
    def kept(values):
        return jnp.sum(jnp.where(keep_largest(values, _counts.from_int(2), magnitude=True), values**2, 0))

    assert jax.grad(kept)(jnp.asarray([1.0, -3.0, 2.0])).tolist() == [0.0, -6.0, 0.0]


@pytest.mark.slow
def test_exports_for_every_platform():
    def select(values, k):
        return keep_largest(values, _counts.rounded(k, values.size), batch=(0,), magnitude=True)

    values = jnp.asarray(draw(0, (4, 30)), jnp.float32)
    exported = export.export(jax.jit(select), platforms=("cpu", "cuda", "tpu"))(values, jnp.float32(0.5))
    call = export.deserialize(exported.serialize()).call
    np.testing.assert_array_equal(call(values, jnp.float32(0.5)), select(values, 0.5))


HARD_POOLS = {
    "constant": lambda rng, n: np.full(n, 0.37),
    "two values": lambda rng, n: rng.choice([1.0, -2.0], n),
    "half zeros": lambda rng, n: rng.normal(size=n) * rng.integers(0, 2, n),
    "whole numbers": lambda rng, n: rng.integers(-99, 100, n),
    "bfloat16 in float32": lambda rng, n: np.asarray(jnp.asarray(rng.normal(size=n), jnp.bfloat16), np.float32),
    "all octaves": lambda rng, n: 2.0 ** rng.uniform(-149, 127, n),
    "two scales": lambda rng, n: rng.normal(size=n) * rng.choice([1e-12, 1.0], n),
    "one far away": lambda rng, n: np.where(np.arange(n) == 7, 1e38, 1 + rng.random(n) * 1e-6),
}


PASSES = []


def sum_and_note(conditions, axes):
    jax.debug.callback(lambda: PASSES.append(axes))
    return _largest._sum_stacked(conditions, axes)


select_and_note = jax.jit(functools.partial(_largest._select_each, each=(_largest.Each((), False),), sums=sum_and_note))


def count_passes(values, removed):
    """Count the passes of a search; whatever is removed is checked, too."""
    PASSES.clear()
    [mask] = select_and_note([values], [_counts.from_int(removed)])
    jax.effects_barrier()
    assert int((~mask).sum()) == removed
    return len(PASSES)


@pytest.mark.parametrize("name", HARD_POOLS)
def test_passes_are_bounded(name):
    values = jnp.asarray(HARD_POOLS[name](np.random.default_rng(0), 4000), jnp.float32)
    for removed in (100, 2000, 3000, 3999):
        # A first look, a failed interpolation and eleven cuts of the 2**32 keys into eight; a failed interpolation and
        # four such cuts of the 2**12 positions.
        assert count_passes(values, removed) <= 13 + 5


def test_usual_weights_take_few_passes():
    values = jnp.asarray(np.abs(np.random.default_rng(0).normal(size=4000)) * 0.02, jnp.float32)
    for removed in (2000, 3600, 3960):
        assert count_passes(values, removed) <= 7


@pytest.mark.slow
def test_one_cpu_device_needs_hardly_any_memory():
    values = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    removed = jax.eval_shape(lambda: _counts.from_int(0))
    for batch in ((), (0,), (1,)):
        each = (_largest.Each(batch, True),)
        select = functools.partial(_largest._select_each, each=each, sums=_largest._sum_in_one)
        compiled = compiled_for_users(jax.jit(select), [values], [removed])
        assert compiled.memory_analysis().temp_size_in_bytes <= 0.1 * 4 * 1000 * 1000
        assert not MOVES.search(compiled.as_text())


# What moves data between entries or devices.
MOVES = re.compile(r"= \S+ (sort|gather|scatter|all-gather|all-to-all|collective-permute)\(")


def check_sharded(jitted, oracle_masks, values):
    """The masks of the unsharded arrays, sharded as the values, by all-reduces of counts and nothing else."""
    compiled = compiled_for_users(jitted, *values)
    text = compiled.as_text()
    assert not MOVES.search(text)
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
        for line in text.splitlines()
        if " all-reduce(" in line
        for dims in re.findall(r"\w+\[([\d,]*)\]", line.split(" all-reduce(")[0])
    ]
    assert sizes
    assert max(sizes) <= 7 * 64
    for mask, expected, array in zip(compiled(*values), oracle_masks, values, strict=True):
        np.testing.assert_array_equal(mask, expected)
        assert mask.sharding.is_equivalent_to(array.sharding, array.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    values, more = draw(0, (64, 96)), draw(1, (2, 48, 16))
    removed = _counts.from_int(5000)
    with jax.set_mesh(mesh):
        array = jax.device_put(jnp.asarray(values, jnp.float32), NamedSharding(mesh, P("x", "y")))
        other = jax.device_put(jnp.asarray(more, jnp.bfloat16), NamedSharding(mesh, P(None, ("x", "y"), None)))

        layer = jax.jit(lambda array: [keep_largest(array, removed, magnitude=True)])
        check_sharded(layer, [oracle(values, 5000, True).reshape(64, 96)], [array])

        rows = jax.jit(lambda array: [keep_largest(array, _counts.from_int(70), batch=(0,), magnitude=False)])
        check_sharded(rows, [oracle_in_pools(values, 70, (0,), False)], [array])

        jointly = jax.jit(lambda *arrays: keep_largest_jointly(arrays, removed, magnitude=True))
        exact = jnp.asarray(more, jnp.bfloat16).astype(jnp.float32)
        mask = oracle(np.concatenate([np.ravel(values.astype(np.float32)), np.ravel(exact)]), 5000, True)
        check_sharded(jointly, [mask[:6144].reshape(64, 96), mask[6144:].reshape(2, 48, 16)], [array, other])


def test_eagerly_on_sharded_arrays():
    mesh = jax.make_mesh((8,), ("x",))
    values = draw(0, (64, 96))
    array = jax.device_put(jnp.asarray(values, jnp.float32), NamedSharding(mesh, P(None, "x")))
    mask = keep_largest(array, _counts.from_int(5000), magnitude=True)
    np.testing.assert_array_equal(mask, oracle(values, 5000, True).reshape(64, 96))
    assert mask.sharding.is_equivalent_to(array.sharding, 2)


def test_pools_within_a_device():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    values = draw(0, (16, 50))
    select = jax.shard_map(
        lambda block: keep_largest(block, _counts.from_int(30), batch=(0,), magnitude=True),
        mesh=mesh,
        in_specs=P("x", None),
        out_specs=P("x", None),
    )
    mask = jax.jit(select)(jnp.asarray(values, jnp.float32))
    np.testing.assert_array_equal(mask, oracle_in_pools(values, 30, (0,), True))
