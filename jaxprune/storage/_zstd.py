"""Streams of bytes through zstd, by the library zstandard, which is imported when it is needed."""

from collections.abc import Iterator
from typing import Any, BinaryIO

MAGIC = b"\x28\xb5\x2f\xfd"
CHUNK = 2**20
# A small file may take its time, for the sake of its names and shapes. In a large one bits and codes repeat by chance
# alone, and all that zstd can do is give frequent bytes short codes: short matches only lose.
_SMALL = 2**20
_THOROUGH, _FAST, _SHORTEST_MATCH = 19, 1, 7
_WIDEST_WINDOW = 2**27  # what the zstd program reads without being told to


class Damaged(Exception):
    """The compressed bytes are not what zstd wrote."""


def _library() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "compressed files need the library zstandard: pip install 'jaxprune[storage]'", name="zstandard"
        ) from error
    return zstandard


class Compressor:
    """Write one zstd frame to a file; each piece begins a block of its own, with statistics of its own."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        """Begin a frame for so many bytes."""
        self._library = _library()
        self._file = file
        choose = self._library.ZstdCompressionParameters.from_level
        if size <= _SMALL:
            parameters = choose(_THOROUGH, source_size=size, write_checksum=True)
        else:
            strategy = self._library.STRATEGY_DFAST
            parameters = choose(_FAST, strategy=strategy, min_match=_SHORTEST_MATCH, write_checksum=True)
        self._frame = self._library.ZstdCompressor(compression_params=parameters).compressobj(size=size)

    def write(self, data: Any) -> None:
        """Compress a piece."""
        self._file.write(self._frame.compress(data))
        self._file.write(self._frame.flush(self._library.COMPRESSOBJ_FLUSH_BLOCK))

    def finish(self) -> None:
        """End the frame."""
        self._file.write(self._frame.flush())


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file piece by piece; a truncated frame just ends early."""
    library = _library()
    reader = library.ZstdDecompressor(max_window_size=_WIDEST_WINDOW).stream_reader(file, read_across_frames=True)
    try:
        while chunk := reader.read(CHUNK):
            yield chunk
    except library.ZstdError as error:
        raise Damaged(str(error)) from error
