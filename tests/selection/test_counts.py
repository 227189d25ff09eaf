import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune._selection import _counts
from jaxprune._selection._counts import Count

SIZES = (0, 1, 2, 3, 6, 10, 100, 2**24 + 1, 10**9, 2**31, 2**32 + 5, 2**40 + 12345, 2**61 + 7)


def ints(count: Count) -> list[int]:
    return [(int(high) << 32) + int(low) for high, low in zip(np.ravel(count.high), np.ravel(count.low), strict=True)]


@pytest.mark.parametrize(
    ("k", "n", "removed"),
    [
        (0.0, 7, 0),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.5, 5, 2),  # 2.5, to even
        (0.5, 7, 4),  # 3.5, to even
        (0.35, 10, 4),  # the double below 0.35, but 3.5 as Python multiplies
        (0.9, 10**9, 900_000_000),
        (0.9, 3 * 10**9, 2_700_000_000),
        (0.9, 10**10, 9_000_000_000),
    ],
)
def test_python_floats_round_as_python_does(k, n, removed):
    assert ints(_counts.rounded(k, n)) == [removed] == [round(k * n)]


@pytest.mark.parametrize(
    ("k", "n", "removed"),
    [(0.9, 10, 9), (0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1), (1, 3, 3), (0.3, 10**10, 3 * 10**9)],
)
def test_python_floats_are_floored_as_written(k, n, removed):
    assert ints(_counts.floored(k, n)) == [removed]


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("count", "oracle"), [(_counts.rounded, round), (_counts.floored, math.floor)])
def test_traced_float32_is_exact(count, oracle, n):
    rng = np.random.default_rng(0)
    # Numbers of many digits; numbers of few, which tie at one half; the extremes.
    ks = [rng.random(200), rng.integers(0, 2**6, 60) / 2**6, [0, 1, 1e-45, 1e-38, 2**-31, 2**-33, 1 - 2**-24]]
    ks = np.concatenate(ks).astype(np.float32)
    found = jax.jit(lambda k: count(k, n))(ks)
    assert ints(found) == [oracle(Fraction(float(k)) * n) for k in ks]


def test_a_float32_is_taken_at_its_word():
    # The float32 next to 0.9 lies 2.4e-8 below it.
    assert ints(_counts.rounded(jnp.float32(0.9), 10**9)) == [899_999_976]
    assert ints(_counts.rounded(jnp.bfloat16(0.9), 1000)) == [898]  # bfloat16 holds 0.8984375


def test_words_carry_and_compare():
    small, large = _counts.from_int(2**32 - 1), _counts.from_int(2**32)
    assert ints(_counts.add(small, large)) == [2**33 - 1]
    assert ints(_counts.add(small, _counts.from_int(1))) == [2**32]
    assert ints(_counts.subtract(large, _counts.from_int(1))) == [2**32 - 1]
    assert ints(_counts.minimum(small, large)) == [2**32 - 1]
    assert bool(_counts.less(small, large))
    assert not bool(_counts.less(large, small))
    assert bool(_counts.less_equal(large, large))
    assert not bool(_counts.equal(small, large))
    assert float(_counts.to_float(_counts.from_int(3 * 2**32 + 2**31))) == 3.5 * 2**32
    several = _counts.from_int([1, 2**32, 2**63])
    assert ints(several) == [1, 2**32, 2**63]


@pytest.mark.parametrize("terms", [1, 2, 3, 40, 1000])
def test_totals_exceed_a_word(terms):
    parts = np.random.default_rng(terms).integers(0, 2**32, (terms, 3), dtype=np.uint64)
    parts[0] = 2**32 - 1
    count = Count(jnp.ones((terms, 3), jnp.uint32), jnp.asarray(parts.astype(np.uint32)))
    total = _counts.total(count, (0,), terms * 2**33)
    assert ints(total) == [int(parts[:, i].sum()) + terms * 2**32 for i in range(3)]


def test_totals_within_a_word():
    count = Count(jnp.zeros(4, jnp.uint32), jnp.asarray([2**31, 5, 6, 2**30], jnp.uint32))
    assert ints(_counts.total(count, (0,), 2**32 - 1)) == [2**31 + 2**30 + 11]
