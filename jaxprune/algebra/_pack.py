"""Masks packed to bits, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxprune._tree._paths import flatten
from jaxprune._tree._sharding import sharded_as
from jaxprune.algebra._read import arrays_of, read


def pack(masks: Any) -> Any:
    """Pack masks to bits: an eighth of their bytes.

    Each leaf becomes ``ceil(size / 8)`` bytes, as by ``numpy.packbits(mask, bitorder="little")``: row-major, the first
    entry in the lowest bit, the last byte filled up with zeros. Shapes are not stored: `unpack` reads them off a tree.
    On an Explicit mesh the bits are replicated, since they follow no axis of the parameters.

    Args:
        masks: a tree of boolean masks. May be traced.

    Returns:
        A tree of the same treedef, of vectors of ``uint8``.

    Raises:
        ValueError: a leaf is not a boolean array.

    >>> import jax.numpy as jnp
    >>> pack([jnp.array([[True, False, False], [True, False, False]])])[0].tolist()  # 1 + 8
    [9]
    """
    flat = read(masks, "masks")
    return flat.build([_pack_leaf(mask) for mask in arrays_of(flat, "packed")])


@jax.jit
def _pack_leaf(mask: jax.Array) -> jax.Array:
    mesh = jax.typeof(mask).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        # A sharded axis cannot be flattened there.
        mask = jax.sharding.reshard(mask, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    return jnp.packbits(mask, bitorder="little")


def unpack(packed: Any, like: Any) -> Any:
    """Unpack what `pack` made.

    Args:
        packed: a tree of vectors of ``uint8``. May be traced.
        like: a tree with the same paths whose leaves have the masks' shapes: parameters, masks, or
            ``jax.ShapeDtypeStruct``.

    Returns:
        Masks of the treedef of `like`; sharded as its leaves, where these are arrays.

    Raises:
        ValueError: a leaf is missing, or not the ``ceil(size / 8)`` bytes that its shape needs; the message names it.

    >>> import jax.numpy as jnp
    >>> unpack([jnp.array([9], jnp.uint8)], [jnp.zeros((2, 3))])[0].tolist()
    [[True, False, False], [True, False, False]]
    """
    flat = flatten(like, "like")
    given = flat.aligned(flatten(packed, "packed"))
    leaves = []
    for name, bits, leaf in zip(flat.names, given, flat.leaves, strict=True):
        size = -(-math.prod(np.shape(leaf)) // 8)
        if getattr(bits, "dtype", None) != np.uint8 or np.shape(bits) != (size,):
            found = f"{getattr(bits, 'dtype', type(bits).__name__)}{list(np.shape(bits))}"
            raise ValueError(f"packed has for {name} {found}; its shape {list(np.shape(leaf))} takes uint8[{size}].")
        leaves.append(_unpack_leaf(bits, leaf))
    return flat.build(leaves)


def _unpack_leaf(bits: Any, leaf: Any) -> jax.Array:
    shape = np.shape(leaf)
    bits = jnp.unpackbits(jnp.asarray(bits), count=math.prod(shape), bitorder="little")
    mask = bits.astype(bool).reshape(shape)
    return sharded_as(mask, leaf) if isinstance(leaf, jax.Array) else mask
