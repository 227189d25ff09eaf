"""The integers of a module's weight as compressed-tensors keeps them: which tensors stand for them in a file."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.export._compressed._schemes import Scheme
from jaxprune.export._compressed._words import pack_words, unpack_words, words_of
from jaxprune.oneshot import Codes
from jaxprune.storage._container import TensorFile
from jaxprune.storage._tensors import read_codes

# What follows a module's name and a dot.
WEIGHT, SCALE = "weight", "weight_scale"


class Integers(NamedTuple):
    """The codes of a matrix, ``[outputs, inputs]`` or transposed.

    Attributes:
        codes: int8.
        scale: in the dtype of the leaf, with fewer entries along the inputs.
        zero: int8, of the scale's shape; None where all are 0.
        scheme: what the configuration says of them.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    scheme: Scheme

    @property
    def inputs_first(self) -> bool:
        """Whether they are ``[inputs, outputs]``."""
        return _inputs_axis(self.codes.shape, self.scale.shape) == 0

    def transposed(self) -> "Integers":
        """Swap outputs and inputs."""
        zero = None if self.zero is None else self.zero.T.copy()
        return self._replace(codes=self.codes.T.copy(), scale=self.scale.T.copy(), zero=zero)

    def tensors(self, module: str, round_inputs: bool) -> dict[str, np.ndarray]:
        """Return what stands in a file for codes ``[outputs, inputs]``, packed unless inputs are rounded as well."""
        codes, scale, zero, (bits, _, _) = self
        found = {"weight_scale": scale}
        if round_inputs:
            found |= {"weight": codes} | ({} if zero is None else {"weight_zero_point": zero})
        else:
            found |= {"weight_packed": pack_words(codes, bits), "weight_shape": np.array(codes.shape, np.int64)}
            found |= {} if zero is None else {"weight_zero_point": pack_words(zero.T, bits).T}
        return {module + part: array for part, array in found.items()}


def read_integers(codes: Codes, mask: np.ndarray | None, values: Any, title: str) -> Integers:
    """Check that codes are those of a leaf, and that the format can express them; raise a ValueError where not."""
    held, scale, zero = read_codes(codes, mask, values.dtype, values.shape, title)
    remedy = "ake its entry out of found.codes, and it is written as numbers."
    if held.ndim != 2:
        raise ValueError(
            f"codes of {title} are of shape {held.shape}; compressed-tensors has integers for matrices only. T{remedy}"
        )
    axis = _inputs_axis(held.shape, scale.shape)
    if scale.shape[1 - axis] != held.shape[1 - axis]:
        raise ValueError(f"codes of {title}, {held.shape}, have scales {scale.shape} that outputs share. T{remedy}")
    inputs, groups = held.shape[axis], scale.shape[axis]
    if inputs % groups:
        raise ValueError(
            f"codes of {title} have {groups} scales for {inputs} inputs; compressed-tensors has groups of one length only. "
            f"Choose a group_size that divides {inputs}, or t{remedy}"
        )
    return Integers(held, scale, zero, Scheme(codes.bits, zero is None, inputs // groups if groups > 1 else None))


def take_integers(module: str, tensors: dict[str, np.ndarray], scheme: Scheme, file: TensorFile) -> Integers:
    """Take the tensors of a module's weight out of those of a file; raise a StorageError where they do not fit each other."""
    name = module + WEIGHT
    if module + "weight_g_idx" in tensors:
        file.fail("has groups in the order of activations, which is not read", name)
    scale, bits = tensors.pop(module + SCALE), scheme.bits
    packed, shape, zero = (tensors.pop(f"{name}_{part}", None) for part in ("packed", "shape", "zero_point"))
    held = tensors.pop(name, None) if packed is None else packed
    if held is None:
        file.fail("has scales and no integers", name)
    size = held.shape
    if packed is not None:
        size = () if shape is None or shape.dtype != np.int64 else tuple(shape.reshape(-1).tolist())
    if len(size) != 2 or not (
        _is(held, np.int8, size) if packed is None else _is(held, np.int32, (size[0], words_of(size[1], bits)))
    ):
        file.fail(f"of shape {size} has {held.dtype}{list(held.shape)}, no matrix of {bits}-bit integers", name)
    groups = 1 if scheme.group_size is None else -(-size[1] // scheme.group_size)
    if scale.dtype.kind not in "fV" or scale.shape != (size[0], groups) or size[1] % groups:
        file.fail(f"of shape {size} has scales of {scale.dtype}{list(scale.shape)}, which do not fit", name)
    words = (words_of(size[0], bits), groups)
    if zero is not None and not (_is(zero, np.int8, scale.shape) if packed is None else _is(zero, np.int32, words)):
        file.fail(f"has codes of zero of {zero.dtype}{list(zero.shape)}, which do not fit", name)
    if packed is None:
        return Integers(held, scale, zero, scheme)
    zero = None if zero is None else unpack_words(zero.T, size[0], bits).T
    return Integers(unpack_words(held, size[1], bits), scale, zero, scheme)


def _inputs_axis(shape: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """The axis along which several entries share a scale; the first where none do."""
    return int(scales[0] == shape[0] and scales[1] < shape[1])


def _is(array: np.ndarray, dtype: type[np.generic], shape: tuple[int, ...]) -> bool:
    return array.dtype == dtype and array.shape == shape
