"""Two of every four weights: their values and places, and the layouts in which sparse tensor cores want the places."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Num, UInt8


class TwoFour(NamedTuple):
    """A kernel of which every four inputs of an output keep two at most, without those that are pruned.

    Attributes:
        values: ``[..., outputs, inputs / 2]``, two of each four in their order.
        indices: uint8 ``[..., outputs, inputs / 4, 2]``, which ones of four they are: the first 0 to 2, the second 1 to 3, and
            larger than the first.
    """

    values: Num[np.ndarray, "*stack outputs half"]
    indices: UInt8[np.ndarray, "*stack outputs fours 2"]

    def dense(self) -> Num[np.ndarray, "*stack inputs outputs"]:
        """Return the kernel, ``[..., inputs, outputs]``, zero where it is pruned.

        >>> sparse = TwoFour(np.array([[1.5, 2.5]]), np.array([[[1, 3]]], np.uint8))
        >>> sparse.dense().ravel().tolist()
        [0.0, 1.5, 0.0, 2.5]
        """
        fours = np.zeros((*self.indices.shape[:-1], 4), self.values.dtype)
        np.put_along_axis(fours, self.indices.astype(np.int64), self.values.reshape(self.indices.shape), axis=-1)
        return fours.reshape(*self.values.shape[:-1], 2 * self.values.shape[-1]).swapaxes(-1, -2).copy()


def to_two_four(kernel: Any, mask: Any) -> TwoFour:
    """Take apart a kernel that a mask by ``rules.n_m(4)`` with k = 2 has pruned: values and places, on the host.

    Where a group keeps one weight or none, pruned ones make up the two, with the value zero, and the same ones as in PyTorch: the
    third, beside the first or the second; otherwise the third and the fourth.

    Args:
        kernel: ``[..., inputs, outputs]``, the number of inputs a multiple of 4. Give ``kernel.T`` where outputs come first.
        mask: its mask, bool, True = keep.

    Returns:
        The values, in the dtype of the kernel, and the places.

    Raises:
        ValueError: shapes do not fit, or a group keeps more than two. The message says which one.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [8.0]])
    >>> mask = jnp.array([[True], [False], [False], [True], [False], [True], [False], [False]])
    >>> found = to_two_four(kernel, mask)
    >>> found.values.tolist(), found.indices.tolist()
    ([[1.0, 4.0, 6.0, 0.0]], [[[0, 3], [1, 2]]])
    """
    values, keep = np.asarray(kernel), np.asarray(mask)
    if values.ndim < 2 or values.shape[-2] % 4:
        raise ValueError(
            f"to_two_four(kernel, mask) takes [..., inputs, outputs], inputs in fours; got {values.shape}."
        )
    if keep.shape != values.shape or keep.dtype != bool:
        raise ValueError(
            f"The mask of {list(values.shape)} is bool and of its shape, not {keep.dtype}{list(keep.shape)}."
        )
    values, keep = (_in_fours(array) for array in (np.where(keep, values, np.zeros_like(values)), keep))
    too_many = np.argwhere(keep.sum(axis=-1) > 2)
    if len(too_many):
        *stack, output, group = too_many[0].tolist()
        layer = f" of layer {', '.join(map(str, stack))}" if stack else ""
        raise ValueError(
            f"mask keeps {keep[tuple(too_many[0])].sum()} of the inputs {4 * group} to {4 * group + 3} of output {output}{layer}, "
            "not two at most. Make it by rule=rules.n_m(4) with k = 2."
        )
    one, two, _, four = np.moveaxis(keep, -1, 0)
    first = np.where(one, 0, np.where(two, 1, 2))
    second = np.where(one & two, 1, np.where(four | ~(one | two), 3, 2))
    indices = np.stack([first, second], axis=-1)
    taken = np.take_along_axis(values, indices, axis=-1)
    return TwoFour(taken.reshape(*taken.shape[:-2], -1), indices.astype(np.uint8))


def pack_cutlass(sparse: TwoFour) -> np.ndarray:
    """Pack the places as the sparse matrix products of CUTLASS for Ampere take them, which PyTorch uses; values stay as they are.

    Four bits for each four inputs, the first place in the lower two, as many as fit in a word; then words are moved: rows within
    groups of 32 (of 16, where values have 8 bits), the corners of squares of two rows and two words, and two words of a row next to
    each other before those of the next row.

    Args:
        sparse: of two axes: outputs a multiple of 32 and inputs of 32 for values of 16 bits, of 16 and 64 for int8.

    Returns:
        int16 ``[outputs, inputs / 16]``, or int32 ``[outputs, inputs / 32]`` for int8.

    Raises:
        ValueError: values have another dtype or shape.

    >>> mask = np.tile(np.array([True, False, False, True]), 8)[:, None] & np.ones((1, 32), bool)
    >>> metadata = pack_cutlass(to_two_four(np.ones((32, 32), np.float16), mask))
    >>> metadata.dtype, metadata.shape, hex(metadata.view(np.uint16)[0, 0])  # 0 and 3: 0b1100
    (dtype('int16'), (32, 2), '0xcccc')

    Reference: CUTLASS 2, ``host_reorder.h`` and the layout ``ColumnMajorInterleaved<2>``.
    """
    rows, _, word = _cutlass_shape(sparse.values)
    quads = sparse.indices[..., 0] | sparse.indices[..., 1] << 2
    pairs = quads[:, 0::2] | quads[:, 1::2] << 4  # the first four in the lower half of a byte
    words = np.ascontiguousarray(pairs).view(word.newbyteorder("<")).astype(word)
    moved = np.empty(words.size, word)
    moved[_cutlass_places(rows, words.shape[1], word)] = words
    return moved.reshape(words.shape)


def unpack_cutlass(values: Any, metadata: Any) -> TwoFour:
    """Undo `pack_cutlass`.

    Args:
        values: ``[outputs, inputs / 2]``.
        metadata: what `pack_cutlass` returned.

    Returns:
        The values and the places.

    Raises:
        ValueError: the two do not fit each other.
    """
    values, metadata = np.asarray(values), np.asarray(metadata)
    rows, inputs, word = _cutlass_shape(values)
    shape = (rows, inputs // 2 // word.itemsize // 4)
    if metadata.shape != shape or metadata.dtype != word:
        raise ValueError(
            f"values {values.dtype}{list(values.shape)} go with {word}{list(shape)}; got {metadata.dtype}{list(metadata.shape)}."
        )
    words = metadata.reshape(-1)[_cutlass_places(*shape, word)]
    pairs = np.ascontiguousarray(words.astype(word.newbyteorder("<"))).view(np.uint8)
    quads = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(rows, inputs // 4)
    return _checked(TwoFour(values, np.stack([quads & 3, quads >> 2], axis=-1)))


def pack_tcgen05(sparse: TwoFour) -> np.ndarray:
    """Pack the places as Pallas wants them in shared memory for ``tcgen05_mma`` on Blackwell; values stay as they are.

    Args:
        sparse: of two axes, outputs and inputs multiples of 128, values of 8 or 16 bits.

    Returns:
        uint2 ``[outputs / 128, inputs / 128, 128, 64]``, for ``plgpu.async_copy_sparse_metadata_to_tmem``.

    Raises:
        ValueError: values have another dtype or shape.

    >>> mask = np.tile(np.array([True, False, False, True]), 32)[:, None] & np.ones((1, 128), bool)
    >>> pack_tcgen05(to_two_four(np.ones((128, 128), np.float16), mask)).shape
    (1, 1, 128, 64)

    Reference: ``format_tcgen05_sparse_metadata`` of ``jax.experimental.pallas.mosaic_gpu``; NVIDIA, Parallel Thread Execution, sparse
    matrices of ``tcgen05``.
    """
    split, order, tiles = _tcgen05_layout(sparse.values)
    return sparse.indices.reshape(split).transpose(order).reshape(tiles).astype(ml_dtypes.uint2)


def unpack_tcgen05(values: Any, metadata: Any) -> TwoFour:
    """Undo `pack_tcgen05`.

    Args:
        values: ``[outputs, inputs / 2]``.
        metadata: what `pack_tcgen05` returned.

    Returns:
        The values and the places.

    Raises:
        ValueError: the two do not fit each other.
    """
    values, metadata = np.asarray(values), np.asarray(metadata)
    split, order, tiles = _tcgen05_layout(values)
    if metadata.shape != tiles or metadata.dtype != ml_dtypes.uint2:
        raise ValueError(
            f"values {values.dtype}{list(values.shape)} go with uint2{list(tiles)}; got {metadata.dtype}{list(metadata.shape)}."
        )
    moved = metadata.astype(np.uint8).reshape([split[axis] for axis in order])
    rows, half = values.shape
    return _checked(TwoFour(values, moved.transpose(np.argsort(order)).reshape(rows, half // 2, 2)))


def _in_fours(array: np.ndarray) -> np.ndarray:
    """``[..., inputs, outputs]`` as ``[..., outputs, inputs / 4, 4]``."""
    turned = array.swapaxes(-1, -2)
    return turned.reshape(*turned.shape[:-1], -1, 4)


def _cutlass_shape(values: np.ndarray) -> tuple[int, int, np.dtype[Any]]:
    """Outputs, inputs, and the words for which values have the right dtype."""
    words: dict[Any, type[np.generic]] = {np.float16: np.int16, ml_dtypes.bfloat16: np.int16, np.int8: np.int32}
    word = np.dtype(words.get(values.dtype.type, np.void))
    if not word.itemsize:
        raise ValueError(f"CUTLASS takes 2:4 in float16, bfloat16 and int8, not in {values.dtype}; cast the kernel.")
    multiples = (32, 32) if word.itemsize == 2 else (16, 64)
    rows, inputs = _matrix(values, multiples)
    return rows, inputs, word


def _cutlass_places(rows: int, columns: int, word: np.dtype[Any]) -> np.ndarray:
    """Where each word of ``[rows, columns]`` stands."""
    row, column = np.indices((rows, columns))
    group = 32 if word.itemsize == 2 else 16
    row = row // group * group + row % 8 * (group // 8) + row % group // 8
    swap = (column % 2) - (row % 2)  # 1 in the upper right corner of a square, -1 in the lower left one
    row, column = row + swap, column - swap
    return column // 2 * (2 * rows) + row * 2 + column % 2


def _tcgen05_layout(values: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """How places ``[outputs, inputs / 2]`` are split, in which order the pieces lie, and the shape of the tiles."""
    rows, inputs = _matrix(values, (128, 128))
    tiles = (rows // 128, inputs // 128)
    if values.dtype.itemsize == 1:
        return (tiles[0], 128, tiles[1], 64), (0, 2, 1, 3), (*tiles, 128, 64)
    if values.dtype.itemsize == 2:
        return (tiles[0], 8, 2, 8, tiles[1], 4, 2, 8), (0, 4, 1, 6, 3, 5, 2, 7), (*tiles, 128, 64)
    raise ValueError(f"tcgen05 takes 2:4 in dtypes of 8 and 16 bits, not in {values.dtype}; cast the kernel.")


def _matrix(values: np.ndarray, multiples: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs of values, both multiples of what the layout wants."""
    if values.ndim != 2 or values.shape[0] % multiples[0] or 2 * values.shape[1] % multiples[1] or not values.size:
        raise ValueError(
            f"The layout takes values [outputs, inputs / 2], outputs a multiple of {multiples[0]} and inputs of {multiples[1]}; "
            f"got {values.shape}."
        )
    return values.shape[0], 2 * values.shape[1]


def _checked(sparse: TwoFour) -> TwoFour:
    wrong = np.argwhere(sparse.indices[..., 0] >= sparse.indices[..., 1])
    if len(wrong):
        output, group = wrong[0].tolist()
        raise ValueError(
            f"metadata has for the inputs {4 * group} to {4 * group + 3} of output {output} no two places."
        )
    return sparse
