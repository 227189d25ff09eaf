"""Weights as small integers: symmetric, with one scale for each output channel."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class Codes(NamedTuple):
    """Quantised weights.

    Attributes:
        codes: int8, of the weights' shape.
        scale: in the weights' dtype and rank; 1 along the axes of the inputs.
        largest_error: the largest magnitude of ``weight - code * scale``.
        relative_error: the root mean square of the errors over that of the weights.
    """

    codes: np.ndarray
    scale: np.ndarray
    largest_error: float
    relative_error: float


def quantize(weights: np.ndarray, outputs: tuple[int, ...], bits: int) -> Codes:
    """Round weights to multiples of a scale, the nearest of ``2**bits - 1`` that lie symmetrically around zero.

    The scale of a channel is its largest magnitude over ``2**(bits - 1) - 1``, rounded up to 8 significant bits so that
    it compresses well. No weight moves by more than half its channel's scale, up to rounding in its own dtype.

    Args:
        weights: a floating-point array; those that are pruned are zero.
        outputs: the axes that number the output channels.
        bits: 2 to 8.

    Returns:
        The codes and the scales. A scale is not finite where one of its channel's weights is not.
    """
    wide = weights.astype(np.promote_types(weights.dtype, np.float32))
    most = 2 ** (bits - 1) - 1
    inputs = tuple(axis for axis in range(wide.ndim) if axis not in outputs)
    scale = _round_up(np.max(np.abs(wide), axis=inputs, keepdims=True, initial=0) / most, weights.dtype)
    step = scale.astype(wide.dtype)
    if not np.isfinite(step).all():
        return Codes(np.zeros(wide.shape, np.int8), scale, np.nan, np.nan)
    # The scale of an empty channel is zero, or of one whose weights are too small to have any.
    ratio = np.divide(wide, step, out=np.zeros_like(wide), where=step > 0)
    codes = np.clip(np.rint(ratio, out=ratio), -most, most, out=ratio).astype(np.int8)
    error = wide - dequantize(codes, scale).astype(wide.dtype)
    norm = _norm(wide)
    relative = _norm(error) / norm if norm else 0.0
    return Codes(codes, scale, _largest(error), relative)


def dequantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Multiply codes by their scales, which broadcast; the result has the dtype of the scales."""
    most = float(ml_dtypes.finfo(scale.dtype).max)
    wide = np.promote_types(scale.dtype, np.float32)
    with np.errstate(over="ignore"):  # a scale that was rounded up may reach beyond the largest number
        return np.clip(codes * scale.astype(wide), -most, most).astype(scale.dtype)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack a vector of codes of 4 bits, two a byte, the first in the lower half."""
    padded = np.zeros(codes.size + codes.size % 2, np.uint8)
    padded[: codes.size] = codes.view(np.uint8) & 15
    return padded[0::2] | padded[1::2] << 4


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """Unpack a vector of `count` codes of 4 bits."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    # Bit 3 is the sign.
    return ((halves ^ 8).astype(np.int8) - 8).astype(np.int8)


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
