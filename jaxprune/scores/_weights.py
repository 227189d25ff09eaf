"""Scores from the weights alone: magnitude, noise, LAMP."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._dtypes import real
from jaxprune._tree._axes import Stacked, read_axes
from jaxprune._tree._paths import read_arrays
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.scores._leaves import leaf_score, map_leaves, nan_lowest, widen
from jaxprune.sites._sites import Sites


@leaf_score
def _magnitude(w: jax.Array) -> jax.Array:
    return jnp.abs(w)


def magnitude(params: Any) -> Any:
    """Score weights by their magnitude, ``|w|``, of complex ones their modulus.

    What `make_masks` ranks by when it is given no scores, without a copy of the parameters.

    >>> import jax.numpy as jnp
    >>> magnitude([jnp.array([2.0, -3.0, jnp.nan])])[0].tolist()
    [2.0, 3.0, -inf]
    """
    return map_leaves(_magnitude, read_arrays(params, "params"))


@jax.jit
def _random(w: jax.Array, key: jax.Array, position: int) -> jax.Array:
    def draw(w: jax.Array, key: jax.Array) -> jax.Array:
        w = widen(w)
        noise = jax.random.uniform(jax.random.fold_in(key, position), w.shape, real(w.dtype))
        return nan_lowest(noise, w)

    return without_explicit_axes(draw, w)(w, key)


def random(params: Any, key: jax.Array) -> Any:
    """Score weights by uniform noise in [0, 1).

    Drawn in float32 whatever the dtype of the parameters: in bfloat16 most draws are ties, which go to low
    indices. Each leaf has its own key, derived from its position in the tree, so the scores depend on nothing
    but the key and the shapes: they are the same on every device, for every sharding and under jit.

    Args:
        params: a pytree of arrays.
        key: a PRNG key.

    Returns:
        Scores of the treedef of params, float32.

    >>> import jax, jax.numpy as jnp
    >>> scores = random([jnp.zeros(1000, jnp.bfloat16)], jax.random.key(0))[0]
    >>> scores.dtype, bool((scores >= 0).all() and (scores < 1).all()), len(set(scores.tolist()))
    (dtype('float32'), True, 1000)
    """
    flat = read_arrays(params, "params")
    return map_leaves(lambda leaf, position: _random(leaf, key, position), flat, range(len(flat.leaves)))


def _lamp_layer(magnitudes: jax.Array) -> jax.Array:
    """Score one layer, [n], of finite magnitudes."""
    positions = lax.iota(jnp.int32, magnitudes.size)
    negated, positions = lax.sort((-magnitudes, positions), num_keys=1, is_stable=True)
    # Relative to the largest, so that squares neither overflow nor all underflow; after the sort, since two
    # neighbours may have the same quotient.
    squares = jnp.square(negated / jnp.where(negated[0] < 0, negated[0], 1.0))
    # Sums from the largest on are accurate in float32. A parallel sum may fall by a rounding error, which would
    # reverse the order of two weights, hence the running maximum.
    sums = lax.cummax(jnp.cumsum(squares))
    scores = jnp.where(sums > 0, squares / sums, 0.0)
    return jnp.zeros_like(scores).at[positions].set(scores, unique_indices=True)


@functools.partial(jax.jit, static_argnames="stack")
def _lamp(w: jax.Array, *, stack: tuple[int, ...]) -> jax.Array:
    first = tuple(range(len(stack)))

    def score(w: jax.Array) -> jax.Array:
        wide = widen(w)
        magnitudes = jnp.moveaxis(jnp.where(jnp.isfinite(wide), jnp.abs(wide), 0.0), stack, first)
        layers = magnitudes.reshape(-1, math.prod(magnitudes.shape[len(stack) :]))
        found = jnp.moveaxis(jax.vmap(_lamp_layer)(layers).reshape(magnitudes.shape), first, stack)
        return nan_lowest(jnp.where(jnp.isinf(wide), jnp.inf, found), wide)

    return jnp.abs(widen(w)) if w.size == 0 else without_explicit_axes(score, w)(w)


def lamp(params: Any, *, stacked: Stacked = None, sites: Sites | None = None) -> Any:
    """Score weights by ``w^2`` over the sum of the squares of the layer's weights that are not smaller.

    With `rules.global_sparsity` this is magnitude pruning whose sparsity of each layer follows from the
    scores: within a layer they never reverse the order of the magnitudes (neighbours may tie by rounding, and
    squares below 1e-38 of the largest are zero), and the largest weight of every layer has the score 1, so it
    goes last. Among equal weights the lower row-major index scores higher, the one that rules keep. Infinite
    weights score infinity and are left out of the sums; a layer of zeros scores zeros.

    The definition needs the weights in order, so this score sorts (several seconds for ten million weights on
    a CPU), and a sharded layer is gathered. The sums run from the largest weight on, accurate in float32.

    Args:
        params: a pytree of arrays, a layer of less than 2**31 weights each.
        stacked: which leaves stack layers, as in `make_masks` (static).
        sites: as in `make_masks`, for the stacks (static).

    Returns:
        Scores of the treedef of params, float32 in [0, 1].

    Raises:
        ValueError: `stacked` matches nothing.

    >>> import jax.numpy as jnp
    >>> lamp([jnp.array([1.0, -2.0, 2.0])])[0].tolist()  # 1/9, 4/4, 4/8
    [0.1111111119389534, 1.0, 0.5]

    Reference: Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021,
    equation 3.
    """
    flat = read_arrays(params, "params")
    stacks = [axes.stack for axes in read_axes(flat, stacked, sites)]
    return map_leaves(lambda leaf, stack: _lamp(leaf, stack=stack), flat, stacks)
