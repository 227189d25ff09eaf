"""Write safetensors files chunk by chunk: the header first, then each tensor as it is made."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.storage import _atomic, _zstd
from jaxprune.storage._container import NAMES, StorageError

Arrays = Mapping[str, np.ndarray]


class Spec(NamedTuple):
    """What a header says of a tensor, besides its place."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Chunk(NamedTuple):
    """Tensors that are made together: what they will be, and the function that makes them."""

    specs: Mapping[str, Spec]
    make: Callable[[], Arrays]


def ready(arrays: Arrays) -> Chunk:
    """Return a chunk of arrays that are there already."""
    return Chunk({name: Spec(array.dtype, array.shape) for name, array in arrays.items()}, lambda: arrays)


def write(
    path: Path,
    chunks: Sequence[Chunk],
    metadata: Mapping[str, str],
    *,
    compress: bool,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Write a file that appears whole or not at all; return its bytes.

    Args:
        path: the file; an older one is replaced.
        chunks: what to write. Each is made when its turn comes, and then forgotten.
        metadata: strings for the header.
        compress: whether to pass everything through zstd.
        check: called before the file takes its place, to raise where it should not.

    Raises:
        ValueError: two tensors have the same name, a chunk is not what it was said to be, or `path` is no file.
    """
    offsets = _place(chunks, aligned=not compress)
    header = _header(chunks, offsets, metadata)
    with _atomic.replacing(path) as file:
        if compress:
            total = sum(spec.size for chunk in chunks for spec in chunk.specs.values())
            frame = _zstd.Compressor(file, len(header) + total)
            frame.write(header)
            for arrays in map(_make, chunks):
                for array in arrays.values():
                    frame.write(as_bytes(array))
            frame.finish()
        else:
            file.write(header)
            for arrays in map(_make, chunks):
                for name, array in arrays.items():
                    _write_at(file, len(header) + offsets[name], array)
        check()
        file.seek(0, 2)
        return file.tell()


def write_through(stream: BinaryIO, chunks: Sequence[Chunk], metadata: Mapping[str, str]) -> None:
    """Write what would be an uncompressed file to a stream that need not seek; all chunks are made before the first goes out."""
    offsets = _place(chunks, aligned=True)
    stream.write(_header(chunks, offsets, metadata))
    arrays = {name: array for chunk in chunks for name, array in _make(chunk).items()}
    for name in sorted(offsets, key=offsets.__getitem__):
        stream.write(as_bytes(arrays[name]).data)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """View an array as its bytes in row-major, little-endian order."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).reshape(-1).view(np.uint8)


def _write_at(file: BinaryIO, position: int, array: np.ndarray) -> None:
    if array.size:
        file.seek(position)
        file.write(as_bytes(array).data)


def _make(chunk: Chunk) -> Arrays:
    arrays = chunk.make()
    for name, spec in chunk.specs.items():
        if Spec(arrays[name].dtype, arrays[name].shape) != spec:
            raise StorageError(f"tensor {name!r} changed while it was being written; write it again.")
    return {name: arrays[name] for name in chunk.specs}


def _place(chunks: Sequence[Chunk], *, aligned: bool) -> dict[str, int]:
    """Give each tensor its offset. Readers that map a file want each number at a multiple of its own size."""
    named = [(name, spec) for chunk in chunks for name, spec in chunk.specs.items()]
    if aligned:
        named.sort(key=lambda item: -item[1].dtype.itemsize)
    offsets, end = {}, 0
    for name, spec in named:
        if name in offsets:
            raise ValueError(f"two tensors would be stored under the name {name!r}; rename a leaf.")
        offsets[name], end = end, end + spec.size
    return offsets


def _header(chunks: Sequence[Chunk], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    specs = {name: spec for chunk in chunks for name, spec in chunk.specs.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, offset in sorted(offsets.items(), key=lambda item: item[1]):
        dtype, shape = NAMES[specs[name].dtype], list(specs[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + specs[name].size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
