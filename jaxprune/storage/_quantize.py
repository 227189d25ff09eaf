"""Weights as small integers, with one scale for each output channel or for each group of its inputs."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_PIECE = 2**20  # codes


class Codes(NamedTuple):
    """Quantised weights.

    Attributes:
        codes: int8, of the weights' shape.
        scale: in the weights' rank, shorter along the axes of the inputs.
        largest_error: the largest magnitude of ``weight - code * scale``.
        relative_error: the root mean square of the errors over that of the weights.
    """

    codes: np.ndarray
    scale: np.ndarray
    largest_error: float
    relative_error: float


def quantize(weights: np.ndarray, scales: tuple[int, ...], bits: int, dtype: np.dtype[Any]) -> Codes:
    """Round weights to multiples of a scale, the nearest of ``2**bits - 1`` that lie symmetrically around zero.

    The scale of a group is its largest magnitude over ``2**(bits - 1) - 1``, rounded up to 8 significant bits so that
    it compresses well. No weight moves by more than half its group's scale, up to rounding in the scales' dtype.

    Args:
        weights: a floating-point array; those that are pruned are zero.
        scales: the number of scales along each axis. An axis of n entries with s scales is cut into groups of ``ceil(n / s)``;
            the last one may be shorter.
        bits: 2 to 8.
        dtype: of the scales.

    Returns:
        The codes and the scales. A scale is not finite where one of its group's weights is not.
    """
    wide = weights.astype(np.promote_types(weights.dtype, np.float32))
    most = 2 ** (bits - 1) - 1
    scale = _round_up(_largest_of_groups(wide, scales) / most, dtype)
    step = spread(scale.astype(wide.dtype), wide.shape)
    if not np.isfinite(step).all():
        return Codes(np.zeros(wide.shape, np.int8), scale, np.nan, np.nan)
    # The scale of an empty group is zero, or of one whose weights are too small to have any.
    ratio = np.divide(wide, step, out=np.zeros_like(wide), where=step > 0)
    codes = np.clip(np.rint(ratio, out=ratio), -most, most, out=ratio).astype(np.int8)
    return Codes(codes, scale, *errors(wide, dequantize(codes, scale)))


def dequantize(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> np.ndarray:
    """Multiply codes, less the code of zero where that is not 0, by their scales; the result has the dtype of the scales."""
    most = float(ml_dtypes.finfo(scale.dtype).max)
    wide = np.promote_types(scale.dtype, np.float32)
    step = spread(scale.astype(wide), codes.shape)
    if zero is not None:
        codes = codes.astype(np.int16) - spread(zero.astype(np.int16), codes.shape)
    with np.errstate(over="ignore"):  # a scale that was rounded up may reach beyond the largest number
        found = np.multiply(codes, step, out=step if step.shape == codes.shape else None)
    return np.clip(found, -most, most, out=found).astype(scale.dtype, copy=False)


def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Give each entry of an array of this shape the scale of its group, as far as broadcasting does not."""
    for axis, (scales, entries) in enumerate(zip(scale.shape, shape, strict=True)):
        if scales not in (1, entries):
            repeated = np.repeat(scale, -(-entries // scales), axis=axis)
            scale = repeated[(slice(None),) * axis + (slice(entries),)]
    return scale


def are_groups(scales: int, entries: int) -> bool:
    """Whether an axis of so many entries can have so many scales, each for a group of one length but the last."""
    if scales in (1, entries):
        return True
    return 1 < scales < entries and -(-entries // -(-entries // scales)) == scales


def errors(exact: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the largest magnitude of the difference, and its root mean square over that of the exact values."""
    wide = exact.astype(np.promote_types(exact.dtype, np.float32), copy=False)
    error, norm = wide - found.astype(wide.dtype), _norm(wide)
    return _largest(error), _norm(error) / norm if norm else 0.0


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack a vector of int8 codes of 2 to 4 bits: a string of bits, the first code in the lowest bits of the first byte."""
    if bits == 4:
        padded = np.zeros(codes.size + codes.size % 2, np.uint8)
        padded[: codes.size] = codes.view(np.uint8) & 15
        return padded[0::2] | padded[1::2] << 4
    # Eight codes fill whole bytes; a piece at a time, since a bit takes a byte on the way.
    pieces = [codes[start : start + _PIECE] for start in range(0, codes.size, _PIECE)] or [codes]
    every = [np.unpackbits(piece.view(np.uint8)[:, None], axis=1, count=bits, bitorder="little") for piece in pieces]
    return np.concatenate([np.packbits(piece.reshape(-1), bitorder="little") for piece in every])


def unpack(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Unpack a vector of `count` codes."""
    if bits == 4:
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    else:
        size = _PIECE * bits // 8
        pieces = [packed[start : start + size] for start in range(0, packed.size, size)] or [packed]
        codes = np.concatenate([_unpack_piece(piece, bits) for piece in pieces])[:count]
    # The highest bit is the sign.
    sign = 1 << (bits - 1)
    return ((codes ^ sign).astype(np.int8) - sign).astype(np.int8)


def packed_size(count: int, bits: int) -> int:
    """How many bytes the codes take."""
    return -(-count * bits // 8)


def _unpack_piece(packed: np.ndarray, bits: int) -> np.ndarray:
    ones = np.unpackbits(packed, bitorder="little")
    return np.packbits(ones[: ones.size // bits * bits].reshape(-1, bits), axis=1, bitorder="little")[:, 0]


def _largest_of_groups(values: np.ndarray, scales: tuple[int, ...]) -> np.ndarray:
    """The largest magnitude in each group."""
    whole = tuple(axis for axis, n in enumerate(scales) if n == 1)
    found = np.max(np.abs(values), axis=whole, keepdims=True, initial=0)
    for axis, n in enumerate(scales):
        if n != found.shape[axis]:
            found = np.maximum.reduceat(found, np.arange(n) * -(-found.shape[axis] // n), axis=axis)
    return found


def _round_up(exact: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    mantissa, exponent = np.frexp(exact)
    scale = np.ldexp(np.ceil(mantissa * 256) / 256, exponent).astype(dtype)
    # The smallest numbers of a dtype have fewer bits, and casting to them may round down.
    return np.where(scale < exact, np.nextafter(scale, np.array(np.inf, dtype)), scale)


def _largest(values: np.ndarray) -> float:
    return max(float(np.max(values, initial=0)), -float(np.min(values, initial=0)))


def _norm(values: np.ndarray) -> float:
    with np.errstate(over="ignore", under="ignore"):
        norm = float(np.linalg.norm(values.reshape(-1)))
    if 1e-15 < norm < 1e15:
        return norm
    # Squares of smaller or larger numbers may not be numbers.
    largest = _largest(values)
    return largest * float(np.linalg.norm(values.reshape(-1) / largest)) if largest else 0.0
