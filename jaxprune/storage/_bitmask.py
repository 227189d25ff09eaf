"""The layout ``sparse-bitmask`` of compressed-tensors: a bit for every weight, and the kept values in a row."""

import math

import numpy as np


def encode(values: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Encode an array under its mask.

    Args:
        values: an array of any shape and dtype.
        mask: bool of that shape, True = keep. It is stored as it is: a kept zero stays kept.

    Returns:
        ``shape`` (int64, one entry an axis), ``compressed`` (the kept values in row-major order), ``bitmask`` (uint8,
        the last axis packed to bits, its first entry in the lowest one) and ``row_offsets`` (int64).
    """
    bits = pack(mask)
    return {
        "shape": np.array(values.shape, np.int64),
        "compressed": take(values, mask),
        "bitmask": bits,
        "row_offsets": row_offsets(bits),
    }


def take(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the kept values in row-major order."""
    # On random masks of few entries, indices are several times faster than a mask.
    return values.reshape(-1)[np.flatnonzero(mask)]


def pack(mask: np.ndarray) -> np.ndarray:
    """Pack the last axis to bits; an array without axes has one bit."""
    return np.packbits(mask if mask.ndim else mask.reshape(1), axis=-1, bitorder="little")


def row_offsets(bits: np.ndarray) -> np.ndarray:
    """Count the kept values before each row; with three axes or more the count runs along the first one alone."""
    counts = np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)
    return np.cumsum(counts, axis=0) - counts if counts.ndim else np.zeros((), np.int64)


def decode_mask(shape: tuple[int, ...], bits: np.ndarray) -> np.ndarray:
    """Unpack a bitmask; raise a ValueError where it does not fit the shape or has bits beyond a row."""
    rows = shape if shape else (1,)
    width = -(-rows[-1] // 8)
    if bits.dtype != np.uint8 or bits.shape != (*rows[:-1], width):
        raise ValueError(
            f"a bitmask of {bits.dtype}{list(bits.shape)}, where its shape {list(shape)} takes "
            f"uint8{[*rows[:-1], width]}"
        )
    if rows[-1] % 8 and bits.size and (bits[..., -1] >> (rows[-1] % 8)).any():
        raise ValueError("a bitmask with bits beyond the end of a row")
    return np.unpackbits(bits, axis=-1, count=rows[-1], bitorder="little").view(np.bool_).reshape(shape)


def decode(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Put kept values, in row-major order, back in their places between zeros."""
    dense = np.zeros(math.prod(mask.shape), values.dtype)
    dense[np.flatnonzero(mask)] = values
    return dense.reshape(mask.shape)
