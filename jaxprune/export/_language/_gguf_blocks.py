"""Integers that weights were rounded to already, as the blocks of GGUF: 32 of them behind a scale in float16."""

import functools
from collections.abc import Callable

import numpy as np

from jaxprune.export._language._llama import Leaf, to_pairs
from jaxprune.oneshot import Codes
from jaxprune.storage._tensors import read_codes

BLOCK = 32
_KINDS = {4: "Q4_0", 8: "Q8_0"}


def read_blocks(codes: Codes, leaf: Leaf, head_dim: int | None) -> tuple[str, Callable[[], np.ndarray]]:
    """Return the kind of a kernel's codes, and the function that makes its blocks, uint8 [outputs, bytes].

    Args:
        codes: of the kernel, [inputs, outputs].
        leaf: the kernel.
        head_dim: the features of a head where those that are turned together are to lie side by side; else None.

    Raises:
        ValueError: codes are of another shape, of other bits, have codes of zero, groups of another length, or scales that float16
            cannot hold.
    """
    held, scale, zero = read_codes(codes, None, leaf.dtype, leaf.shape, leaf.name)
    inputs, outputs = held.shape
    if codes.bits not in _KINDS or zero is not None or inputs % BLOCK or scale.shape != (inputs // BLOCK, outputs):
        raise ValueError(
            f"codes of {leaf.name} have {codes.bits} bits, scales {scale.shape}{'' if zero is None else ', and codes of zero'}; GGUF has "
            f"symmetric ones of 4 or 8 bits with a scale for {BLOCK} inputs: bits=4, group_size={BLOCK}. Or take them out of codes."
        )
    half = scale.astype(np.float16)
    if (half.astype(np.float32) != scale.astype(np.float32)).any():
        raise ValueError(f"codes of {leaf.name} have scales that float16 cannot hold, which GGUF has for them.")
    return _KINDS[codes.bits], functools.partial(_blocks, held, half, codes.bits, head_dim)


def _blocks(codes: np.ndarray, scale: np.ndarray, bits: int, head_dim: int | None) -> np.ndarray:
    if head_dim is not None:
        codes, scale = to_pairs(codes, head_dim), to_pairs(scale, head_dim)
    outputs = codes.shape[1]
    values = codes.T.reshape(outputs, -1, BLOCK)
    if bits == 4:  # the first half of a block in the lower halves of its bytes, zero is 8
        above = (values + 8).astype(np.uint8)
        stored = above[..., : BLOCK // 2] | above[..., BLOCK // 2 :] << 4
    else:
        stored = values.view(np.uint8)
    scales = np.ascontiguousarray(scale.T)[..., None].astype("<f2").view(np.uint8)
    return np.concatenate([scales, stored], axis=-1).reshape(outputs, -1)
