"""Integer codes of a leaf, and which of its weights share a scale."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.oneshot._grid import decode
from jaxprune.sites._sites import Site


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "scale", "zero_point"), meta_fields=("bits",)
)
@dataclasses.dataclass(frozen=True)
class Codes:
    """The integers that stand for a leaf's weights: ``(codes - zero_point) * scale``. A pytree.

    Attributes:
        codes: int8, of the leaf's shape; a pruned weight has the code `zero_point`.
        scale: float32, > 0, in the leaf's rank: along an axis of n inputs it has s entries, one for each group of ``ceil(n / s)``
            (the last may be shorter), along any other axis n.
        zero_point: int8, of the scale's shape; all 0 where codes are symmetric.
        bits: of a code, 2 to 8: codes lie in ``-2**(bits - 1) ... 2**(bits - 1) - 1``.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    bits: int

    def values(self) -> jax.Array:
        """Return the weights that the codes stand for, float32, of the leaf's shape.

        >>> codes = Codes(jnp.array([[-3], [1]], jnp.int8), jnp.array([[0.5]]), jnp.zeros((1, 1), jnp.int8), 3)
        >>> codes.values().ravel().tolist()
        [-1.5, 0.5]
        """
        shape = self.codes.shape
        return decode(self.codes, _spread(self.scale, shape), _spread(self.zero_point, shape))


def _spread(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    for axis, (few, many) in enumerate(zip(array.shape, shape, strict=True)):
        if few != many:
            array = jnp.repeat(array, -(-many // few), axis=axis, total_repeat_length=None)
            array = jax.lax.slice_in_dim(array, 0, many, axis=axis)
    return array


class Quantized(NamedTuple):
    """Parameters on a grid of integers.

    Attributes:
        params: of the treedef and dtypes of the parameters given; rounded leaves are ``codes[path].values()``.
        masks: of the same treedef; True = keep.
        codes: the integers of each rounded leaf, by its path.
    """

    params: Any
    masks: Any
    codes: dict[str, Codes]


class Layout(NamedTuple):
    """How the inputs of a site are cut into groups that share a scale.

    Attributes:
        order: the rows of the site's matrices, group after group; None where they stand so already.
        length: of a group, in rows; the last may be shorter.
        total: how many rows there are.
        boxes: how far a group reaches along each axis of the leaf.
    """

    order: np.ndarray | None
    length: int
    total: int
    boxes: tuple[int, ...]

    def ordered(self, matrices: jax.Array) -> jax.Array:
        """Return matrices with their rows in this order."""
        return matrices if self.order is None else matrices[:, self.order]

    def rows(self, of_groups: jax.Array) -> jax.Array:
        """Give each row what its group has: [N, groups, outputs] to [N, rows, outputs]."""
        return jnp.repeat(of_groups, self.length, axis=1)[:, : self.total]

    def first(self, leaf: jax.Array) -> jax.Array:
        """Return the first entry of each group of a leaf, in the leaf's rank."""
        first = tuple(slice(None, None, box) for box in self.boxes)
        shape = tuple(-(-n // box) for n, box in zip(leaf.shape, self.boxes, strict=True))
        return without_explicit_axes(lambda leaf: leaf[first], leaf, shape)(leaf)


def read_layout(site: Site, group_size: int | None, m: int) -> Layout:
    """Cut a site's inputs into groups of at most so many that lie together in the leaf; all of them where None.

    Args:
        site: of the leaf.
        group_size: how many inputs share a scale at most.
        m: how many neighbouring inputs a pattern looks at; a group of the scale holds whole ones.

    Raises:
        ValueError: the leaf's axes cannot be cut so.
    """
    shape, inputs = site.shape, site.in_axes
    if set(inputs) & {*site.out_axes, *site.stack_axes}:
        raise ValueError(
            f"{site.name} has inputs and outputs along the same axis of {shape}: no group of inputs has a scale of its own. "
            "Leave it as it is with prunable=..."
        )
    boxes, room = [1] * len(shape), math.prod(shape) if group_size is None else group_size
    several = sum(shape[axis] > 1 for axis in inputs) > 1
    for axis in sorted(inputs, reverse=True):
        scales = -(-shape[axis] // room)
        boxes[axis] = -(-shape[axis] // scales)
        if several:  # a shorter group at the end of this axis would come again along the next
            boxes[axis] = _even(shape[axis], boxes[axis])
        room = max(1, room // shape[axis])
    alone, cut = site.slice(), site.leading
    with jax.ensure_compile_time_eval():
        places = np.asarray(alone.matrices(jnp.arange(math.prod(alone.shape), dtype=jnp.int32).reshape(alone.shape)))
    at = np.unravel_index(places[0, :, 0], alone.shape)
    inside = boxes[cut:]
    group = _numbered([at[axis] // inside[axis] for axis in alone.in_axes])
    channel = at[alone.input_axis] if alone.input_axis is not None else np.zeros_like(group)
    window = _numbered([at[axis] for axis in alone.in_axes if axis != alone.input_axis], like=group)
    order = np.lexsort((channel, window, group))
    lengths = np.bincount(group)
    # A part of a fused parameter may hold a part of a box.
    reach = [
        np.minimum(inside[axis], alone.shape[axis] - at[axis] // inside[axis] * inside[axis]) for axis in alone.in_axes
    ]
    whole = (math.prod(reach) == lengths[group]).all()
    ragged = f"the {' x '.join(str(shape[axis]) for axis in inputs)} inputs of {site.name}"
    if not whole or (lengths[:-1] != lengths[0]).any() or lengths[-1] > lengths[0]:
        raise ValueError(f"Groups of at most {group_size} do not divide {ragged}. Choose group_size so that they do.")
    pattern = np.stack([group, window, channel // m])[:, order]
    if m > 1 and (len(order) % m or (pattern[:, 0::m] != pattern[:, m - 1 :: m]).any()):
        raise ValueError(
            f"A scale's groups of {lengths[0]} cut through the pattern's groups of {m} among {ragged}. Choose a multiple of "
            f"{m} that divides them as group_size, or leave this parameter as it is with prunable=..."
        )
    return Layout(None if (order == np.arange(len(order))).all() else order, int(lengths[0]), len(order), tuple(boxes))


def _even(entries: int, most: int) -> int:
    """Return the largest length that divides an axis, unless that is less than a quarter of the most allowed."""
    length = max(length for length in range(1, most + 1) if entries % length == 0)
    return length if 4 * length >= most else most


def _numbered(coordinates: list[np.ndarray], like: np.ndarray | None = None) -> np.ndarray:
    """Number the different tuples of coordinates in their order."""
    if not coordinates:
        assert like is not None
        return np.zeros_like(like)
    return np.unique(np.stack(coordinates), axis=1, return_inverse=True)[1].reshape(-1)
