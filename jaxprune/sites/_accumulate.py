"""Sums of squares and Gram matrices of data, as a contraction with a parameter sees it."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._dtypes import wide, widen
from jaxprune._tree._sharding import through_compiler
from jaxprune.sites._contractions import Contraction, Window

# Most entries of the patches of a convolution that are written down at once.
_PATCHES = 2**22
# Gram matrices wider than this are taken in quarters, of which one is another's mirror image.
_WHOLE = 256


def sums_of_squares(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Return the sum of squares of every input, ``[B, I]``, and the number of samples, ``[B]``, in float32.

    Of a table, of which rows are read: the inputs are one-hot vectors, so the sums count how often each was read.
    """
    kinds = {"dot": _dot_squares, "conv": _conv_squares, "gather": _reads, "ragged": _ragged_squares}
    return through_compiler(functools.partial(kinds[contraction.kind], contraction), operands)


def grams(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the outer products of the inputs, ``[B, I, I]``, and the number of samples, in float32.

    Accumulated at the highest precision whatever the dtype of the data.
    """
    kinds = {"dot": _dot_gram, "conv": _conv_gram, "ragged": _ragged_gram}
    return through_compiler(functools.partial(kinds[contraction.kind], contraction), operands)


def cross_products(contraction: Contraction, left: Any, right: Any) -> jax.Array:
    """Return ``left^T right`` of two inputs of the same samples, ``[B, I, I]``, for a product or a convolution."""
    kinds = {"dot": _dot_products, "conv": _conv_products}
    return through_compiler(functools.partial(kinds[contraction.kind], contraction), left, right)


def _part(contraction: Contraction, x: jax.Array) -> jax.Array:
    if contraction.part is None:
        return x
    axis, start, size = contraction.part
    return lax.slice_in_dim(x, start, start + size, axis=axis)


def _count(matrices: int, samples: int) -> jax.Array:
    return jnp.full(matrices, samples, jnp.float32)


def _samples(contraction: Contraction, x: jax.Array) -> tuple[int, int, int]:
    """B, T and I."""
    b = math.prod(x.shape[axis] for axis in contraction.batch)
    i = math.prod(x.shape[axis] for axis in contraction.contract)
    return b, x.size // max(b * i, 1), i


def _dot_squares(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    x = _part(contraction, operands[0])
    b, t, i = _samples(contraction, x)
    kept = (*contraction.batch, *contraction.contract)
    sums = jnp.sum(jnp.square(widen(x)), axis=[axis for axis in range(x.ndim) if axis not in kept])
    # The sum keeps the order of the axes.
    order = sorted(kept)
    return jnp.transpose(sums, [order.index(axis) for axis in kept]).reshape(b, i), _count(b, t)


def _dot_gram(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    x = _part(contraction, operands[0])
    b, t, i = _samples(contraction, x)
    if not contraction.batch and t > i > _WHOLE:  # of few samples the product costs less than the mirror image
        free = [axis for axis in range(x.ndim) if axis not in contraction.contract]
        return _symmetric(jnp.transpose(x, [*free, *contraction.contract]).reshape(t, i))[None], _count(b, t)
    return _dot_products(contraction, operands[0], operands[0]), _count(b, t)


def _symmetric(x: jax.Array) -> jax.Array:
    """``x^T x`` of data [T, I], without what lies below the diagonal in large."""
    left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    corner = _outer(left, right, [], [0])
    return jnp.block([[_outer(left, left, [], [0]), corner], [corner.T, _outer(right, right, [], [0])]])


def _dot_products(contraction: Contraction, left: jax.Array, right: jax.Array) -> jax.Array:
    left, right = _part(contraction, left), _part(contraction, right)
    b, _, i = _samples(contraction, left)
    free = [axis for axis in range(left.ndim) if axis not in (*contraction.batch, *contraction.contract)]
    return _outer(left, right, contraction.batch, free).reshape(b, i, i)


def _outer(left: jax.Array, right: jax.Array, batch: Sequence[int], summed: Sequence[int]) -> jax.Array:
    dtype = wide(left.dtype)
    if not jnp.issubdtype(left.dtype, jnp.floating):
        left, right = left.astype(dtype), right.astype(dtype)
    axes = tuple(summed), tuple(batch)
    return lax.dot_general(
        left,
        right,
        ((axes[0], axes[0]), (axes[1], axes[1])),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def _patches(window: Window, x: jax.Array) -> jax.Array:
    """The inputs of every window, ``[samples, channels x window, space...]``, of data with axes in that order."""
    space = "".join(chr(ord("a") + i) for i in range(len(window.size)))
    return lax.conv_general_dilated_patches(
        x,
        window.size,
        window.strides,
        window.padding,
        window.data_dilation,
        window.window_dilation,
        dimension_numbers=("NC" + space, "IO" + space, "NC" + space),
        precision=lax.Precision.HIGHEST,
    )


def _conv_squares(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    window = contraction.window
    assert window is not None
    x = jnp.transpose(operands[0], window.axes)
    # Squares add up over the samples before the windows are cut, which then costs as much as for one sample.
    patches = _patches(window, jnp.sum(jnp.square(widen(x)), axis=0, keepdims=True))
    sums = jnp.sum(patches, axis=range(2, patches.ndim)).reshape(window.groups, -1)
    return sums, _count(window.groups, x.shape[0] * math.prod(patches.shape[2:]))


def _conv_gram(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    window = contraction.window
    assert window is not None
    x = jax.eval_shape(lambda x: _patches(window, jnp.transpose(x, window.axes)), operands[0])
    count = _count(window.groups, x.shape[0] * math.prod(x.shape[2:]))
    return _conv_products(contraction, operands[0], operands[0]), count


def _conv_products(contraction: Contraction, left: jax.Array, right: jax.Array) -> jax.Array:
    window = contraction.window
    assert window is not None
    pair = [jnp.transpose(x, window.axes) for x in ([left] if left is right else [left, right])]
    if not jnp.issubdtype(left.dtype, jnp.floating):
        pair = [widen(x) for x in pair]
    n, groups = pair[0].shape[0], window.groups
    shape = jax.eval_shape(lambda x: _patches(window, x), pair[0]).shape
    i = shape[1] // groups

    def products(pair: Sequence[jax.Array]) -> jax.Array:
        cut = [_patches(window, x).reshape(x.shape[0], groups, i, -1) for x in pair]
        return _outer(cut[0], cut[-1], [1], [0, 3])

    # Patches are larger than the data by the size of the window: a few samples at a time.
    size = max(1, min(n, _PATCHES // max(math.prod(shape[1:]), 1)))
    whole = n // size * size
    sums = jnp.zeros((groups, i, i), wide(pair[0].dtype))
    if whole:
        chunks = [x[:whole].reshape(-1, size, *x.shape[1:]) for x in pair]
        sums = lax.scan(lambda total, chunk: (total + products(chunk), None), sums, chunks)[0]
    return sums + products([x[whole:] for x in pair]) if whole < n else sums


def _reads(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    indices = jnp.moveaxis(operands[0][..., contraction.column], contraction.batch, range(len(contraction.batch)))
    b = math.prod(indices.shape[: len(contraction.batch)])
    indices = indices.reshape(b, -1)
    mode = "clip" if contraction.clip else "drop"
    sums = jnp.zeros((b, contraction.rows), jnp.float32)
    each = jnp.arange(b)[:, None]
    return sums.at[each, indices].add(1.0, mode=mode, wrap_negative_indices=False), _count(b, indices.shape[1])


def _members(contraction: Contraction, x: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row its group, one past the last for a row behind all groups; and the number of rows of each group."""
    groups = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    one_hot = groups[:, None] == jnp.arange(contraction.rows)[None]
    return groups, jnp.sum(one_hot, axis=0, dtype=jnp.float32)


def _ragged_squares(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    x, sizes = operands
    groups, counts = _members(contraction, x, sizes)
    return jax.ops.segment_sum(jnp.square(widen(x)), groups, contraction.rows), counts


def _ragged_gram(contraction: Contraction, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    x, sizes = operands
    groups, counts = _members(contraction, x, sizes)

    def gram(group: jax.Array) -> jax.Array:
        own = jnp.where((groups == group)[:, None], x, 0)
        return _outer(own, own, [], [0])

    return lax.map(gram, jnp.arange(contraction.rows)), counts
