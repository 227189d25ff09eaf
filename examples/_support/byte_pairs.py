"""Text to token numbers and back: by byte pairs, as GPT-2 and those after it do, or byte by byte."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence


class Bytes:
    """Every byte is a token."""

    vocabulary = 256

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; what is no UTF-8 is replaced."""
        return bytes(tokens).decode(errors="replace")

    def sizes(self) -> list[int]:
        """Return how many bytes each token stands for."""
        return [1] * self.vocabulary


# A word with the space before it, a run of signs, spaces; numbers have been cut out before.
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class BytePairs:
    """Byte pair encoding on bytes (Sennrich et al. 2016; Radford et al. 2019), every digit by itself as in SmolLM.

    >>> tokenizer = BytePairs(["a", "b", "Ġ", "ab", "Ġab"], ["a b", "Ġ ab"])
    >>> tokenizer.encode("ab abb"), tokenizer.decode([3, 4, 1])
    ([3, 4, 1], 'ab abb')
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[str]) -> None:
        """Take the tokens by number and the pairs to merge, the first ones first, in the letters that stand for bytes."""
        self.vocabulary = len(tokens)
        self._bytes = {letter: byte for byte, letter in _letters().items()}
        self._tokens = list(tokens)
        self._numbers = {token: number for number, token in enumerate(tokens)}
        self._ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(merges)}
        self._merged = functools.cache(self._merge)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; those with a meaning of their own, such as the end of a text, are not looked for."""
        letters = _letters()
        return [
            self._numbers[token]
            for piece in _without_numbers(text)
            for word in ([piece] if _is_number(piece) else _WORDS.findall(piece))
            for token in self._merged("".join(letters[byte] for byte in word.encode()))
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; what is no UTF-8 is replaced."""
        return b"".join(map(self._spell, tokens)).decode(errors="replace")

    def sizes(self) -> list[int]:
        """Return how many bytes each token stands for."""
        return [len(self._spell(number)) for number in range(self.vocabulary)]

    def _spell(self, number: int) -> bytes:
        token = self._tokens[number]
        return bytes(self._bytes[letter] for letter in token) if self._bytes.keys() >= set(token) else token.encode()

    def _merge(self, word: str) -> tuple[str, ...]:
        """Merge the pair of the lowest rank wherever it stands, until none is left."""
        parts = tuple(word)
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part  # longer now than the first of the pair
                else:
                    merged.append(part)
            parts = tuple(merged)
        return parts


def _is_number(text: str) -> bool:
    return len(text) == 1 and unicodedata.category(text).startswith("N")


def _without_numbers(text: str) -> list[str]:
    """Cut a text so that each digit (and ², ½, Ⅳ) stands alone."""
    pieces: list[str] = [""]
    for letter in text:
        if _is_number(letter):
            pieces += [letter, ""]
        else:
            pieces[-1] += letter
    return [piece for piece in pieces if piece]


@functools.cache
def _letters() -> dict[int, str]:
    """The letter that stands for each byte: itself where it prints, else one from 256 on (Radford et al. 2019)."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in own)
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}
