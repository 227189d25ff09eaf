"""How the leaves of a model are to be stored: which as integers, with how many scales, and the others in which dtype."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from jaxprune._tree._axes import conventional
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune._tree._prunable import is_kernel, is_table
from jaxprune.oneshot import Codes
from jaxprune.storage._tensors import BITS, Encoded, encode

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Coding:
    """What `save_sparse` was asked for; the fields have its words.

    Attributes:
        quantize: the bits of kernels and of what is pruned, or None.
        quantize_tables: the bits of tables, or None.
        group_size: how many inputs share a scale at most; None for all of an output.
        dtype: of what stays floating-point, scales among it; None for its own.
        exchange: whether to store what can be computed from the bitmask but belongs to the layout of others.
    """

    quantize: int | None = None
    quantize_tables: int | None = None
    group_size: int | None = None
    dtype: np.dtype[Any] | None = None
    exchange: bool = True

    @property
    def changes_codes(self) -> bool:
        """Whether what is stored as integers already is to be rounded anew."""
        return not (self.quantize is None and self.quantize_tables is None and self.dtype is None)

    def encode(
        self,
        path: str,
        values: np.ndarray,
        mask: np.ndarray | None,
        *,
        stack: tuple[int, ...] = (),
        codes: Codes | None = None,
        title: str | None = None,
    ) -> Encoded:
        """Encode one tensor; `stack` are its axes of layers, `codes` what it is rounded to already, `title` its name in messages."""
        bits = None if codes is not None else self._bits(path, values, mask)
        return encode(
            path,
            values,
            mask,
            bits=bits,
            scales=scales_of(path, values.shape, self.group_size, stack) if bits else (),
            dtype=self._dtype(values),
            exchange=self.exchange,
            codes=codes,
            title=title,
        )

    def check_tables(self, leaves: Iterable[tuple[str, Any]], what: str) -> None:
        """Raise a ValueError where tables are to be quantised, but none of the leaves, by path, is one."""
        if self.quantize_tables is None or any(is_table(path, leaf) for path, leaf in leaves):
            return
        raise ValueError(
            f"quantize_tables={self.quantize_tables}, but no leaf of {what} is named like a table of embeddings or positions."
        )

    def _bits(self, path: str, values: np.ndarray, mask: np.ndarray | None) -> int | None:
        # Codes and a scale stand for real numbers of more than one byte.
        if not is_floating(values) or is_complex(values) or values.dtype.itemsize == 1 or not values.size:
            return None
        if self.quantize_tables is not None and is_table(path, values):
            return self.quantize_tables
        pruned = mask is not None and not bool(mask.all())
        return self.quantize if pruned or is_kernel(path, values) else None

    def _dtype(self, values: np.ndarray) -> np.dtype[Any] | None:
        """The dtype to round to, where that has fewer bits than the values have."""
        if self.dtype is None or not is_floating(values) or is_complex(values):
            return None
        return self.dtype if self.dtype.itemsize < values.dtype.itemsize else None


def read_coding(
    quantize: int | None, quantize_tables: int | None, group_size: int | None, dtype: str | None, *, compress: bool
) -> Coding:
    """Check what a user asks for; raise a ValueError for what there is not."""
    for name, bits in (("quantize", quantize), ("quantize_tables", quantize_tables)):
        if bits is not None and (isinstance(bits, bool) or bits not in BITS):
            raise ValueError(f"{name} is 8, 4 or None, not {bits!r}.")
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
            raise ValueError(f"group_size is a whole number of inputs, at least 2, or None; got {group_size!r}.")
        if quantize is None and quantize_tables is None:
            raise ValueError(
                "group_size says which integers share a scale; give quantize= or quantize_tables= as well."
            )
    known = None if dtype is None else DTYPES.get(str(dtype))
    if dtype is not None and known is None:
        raise ValueError(f"dtype is one of {', '.join(map(repr, DTYPES))} or None, not {dtype!r}.")
    return Coding(quantize, quantize_tables, group_size, known, exchange=not compress)


def scales_of(
    path: str, shape: tuple[int, ...], group_size: int | None, stack: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Say how many scales a tensor has along each axis: one for each output of each layer, and each group of its inputs.

    Neighbours in memory share a scale: as many inputs along their last axis as a group may have, and where that axis is
    shorter, along the one before as well. An axis is cut into pieces of one length, but for the last.
    """
    outputs = (*stack, *_outputs(path, shape, stack))
    scales = list(shape)
    room = math.prod(shape) if group_size is None else group_size
    for axis in reversed(range(len(shape))):
        if axis not in outputs:
            scales[axis] = -(-shape[axis] // room)
            room = max(1, room // shape[axis])
    return tuple(scales)


def _outputs(path: str, shape: tuple[int, ...], stack: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that number a layer's outputs, or a table's rows; none where a layer has a single axis.

    Where a name does not tell, the last axis does as well: any axis gives scales that values can be restored by.
    """
    if len(shape) - len(stack) < 2:
        return ()
    if is_table(path, np.broadcast_to(0, shape)):
        return tuple(range(len(shape) - 1))
    outputs = conventional(path, shape, stack).outputs
    return (len(shape) - 1,) if outputs is None else outputs
