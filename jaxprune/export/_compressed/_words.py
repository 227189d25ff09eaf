"""Small integers in words of 32 bits, as compressed-tensors packs them: each row a string of bits, the lowest first."""

import numpy as np

_PIECE = 2**20  # codes; a bit takes a byte on the way


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack signed codes of 1 to 8 bits: int8 ``[rows, n]`` to int32 ``[rows, ceil(n * bits / 32)]``.

    A code is stored as what it lies above the smallest one. Where 32 is no multiple of `bits`, a code may begin in one word and
    end in the next; each row begins a new word.
    """
    rows, count = codes.shape
    words = np.zeros((rows, words_of(count, bits)), "<i4")
    for piece in _pieces(rows, count):
        above = (codes[piece].astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
        ones = np.unpackbits(above[..., None], axis=-1, count=bits, bitorder="little").reshape(len(above), count * bits)
        whole = np.pad(ones, ((0, 0), (0, -ones.shape[1] % 32)))
        words[piece] = np.packbits(whole, axis=1, bitorder="little").view("<i4")
    return words


def unpack_words(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Unpack what `pack_words` packed: int32 ``[rows, words]`` to int8 ``[rows, count]``."""
    rows = len(words)
    codes = np.zeros((rows, count), np.int8)
    for piece in _pieces(rows, count):
        stored = np.ascontiguousarray(words[piece].astype("<i4", copy=False)).view(np.uint8)
        ones = np.unpackbits(stored, axis=1, count=count * bits, bitorder="little").reshape(len(stored), count, bits)
        above = np.packbits(ones, axis=-1, bitorder="little")[..., 0]
        codes[piece] = above.astype(np.int16) - (1 << (bits - 1))
    return codes


def words_of(count: int, bits: int) -> int:
    """How many words a row of so many codes takes."""
    return -(-count * bits // 32)


def _pieces(rows: int, count: int) -> list[slice]:
    """Rows to go through at once; none where there are no codes."""
    step = max(1, _PIECE // max(1, count))
    return [slice(row, row + step) for row in range(0, rows, step)] if count else []
