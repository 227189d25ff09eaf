"""Read safetensors files without trusting them: every number of a header is checked before it is used."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, NamedTuple, NoReturn, Self

import ml_dtypes
import numpy as np

from jaxprune.storage import _zstd

# What safetensors calls the dtypes that this package reads and writes.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ZIP = b"PK\x03\x04"
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MOST_AXES = 32
DEEPEST_NAME = 64
# What a compressed file may expand to: this much, or so many times its own size.
EXPANDS_FREELY, EXPANDS_MOST = 2**26, 1_000
EXPANDS_IN_MEMORY = 2**20  # the rest of it goes to a temporary file


class StorageError(ValueError):
    """A file is damaged, or not what it should be; the message names the file and the tensor."""


class Span(NamedTuple):
    """Where a tensor lies: its bytes begin at an offset from the start of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    size: int


class TensorFile:
    """A safetensors file, bare or compressed by zstd, open for reading one tensor at a time; a context manager.

    Attributes:
        path: the file.
        metadata: the strings that its header holds beside the tensors.
        entries: the tensors by name, in the order of the file.
        stored: its size on disk, in bytes.
    """

    def __init__(self, path: str | os.PathLike[str], source: BinaryIO | None = None) -> None:
        """Open a file and check its header; raise a StorageError if it is not a whole safetensors file.

        Args:
            path: the file.
            source: its bytes, where they are a part of the file at `path` that is open already.
        """
        self.path = Path(path)
        self._source: BinaryIO = open(self.path, "rb") if source is None else source  # noqa: SIM115, closed by close()
        self._file: IO[bytes] = self._source
        try:
            self.stored = self._source.seek(0, os.SEEK_END)
            self._opened = _version(self._source)
            self._source.seek(0)
            magic = self._source.read(4)
            if magic == _ZIP:
                self.fail("is a zip, no safetensors file; what export.save wrote is opened by export.load")
            if magic == _zstd.MAGIC:
                self._file = self._expand(self._source)
            self.metadata, self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; raise a StorageError where it has changed since it was opened."""
        try:
            if error is None:
                self.require_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._source.close()

    def require_unchanged(self) -> None:
        """Raise a StorageError where the file was written to since it was opened: what was read may be of two states.

        One that took its place under the same name does no harm, since it is not the one that is read.
        """
        if _version(self._source) != self._opened:
            self.fail("has changed while it was read; read it again when nobody writes to it")

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a new array."""
        entry = self.entries[name]
        data = np.empty(entry.size, np.uint8)
        self._file.seek(entry.offset)
        if _read_into(self._file, data) != entry.size:
            self.fail("ends early; it has changed since it was opened", name)
        if entry.dtype == np.bool_ and entry.size and data.max() > 1:
            self.fail("is BOOL, but has bytes other than 0 and 1", name)
        return data.view(entry.dtype).reshape(entry.shape)

    def fail(self, what: str, name: str | None = None) -> NoReturn:
        """Raise a StorageError about the file, or about one of its tensors."""
        raise StorageError(f"{self.path}: " + (what if name is None else f"tensor {name!r} {what}") + ".")

    def _expand(self, file: BinaryIO) -> IO[bytes]:
        """Expand a compressed file into a temporary one, in memory while it is small."""
        file.seek(0)
        limit = max(EXPANDS_FREELY, EXPANDS_MOST * self.stored)
        expanded = tempfile.SpooledTemporaryFile(max_size=EXPANDS_IN_MEMORY)  # noqa: SIM115, closed by close()
        try:
            total = 0
            for chunk in _zstd.chunks(file):
                total += len(chunk)
                if total > limit:
                    self.fail(f"expands to more than {limit:,} bytes from {self.stored:,}, which no saved model does")
                expanded.write(chunk)
        except _zstd.Damaged as error:
            expanded.close()
            raise StorageError(f"{self.path}: cannot be decompressed ({error}).") from error
        except BaseException:
            expanded.close()
            raise
        return expanded

    def _read_header(self) -> tuple[dict[str, str], dict[str, Span]]:
        total = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        length = int.from_bytes(self._file.read(8), "little")
        if total < 8 or length > min(total - 8, LONGEST_HEADER):
            self.fail(f"is no whole safetensors file: {total:,} bytes, with a header of {length:,}")
        try:
            header = json.loads(
                self._file.read(length).decode(), object_pairs_hook=_unique, parse_constant=_no_constant
            )
        except (ValueError, RecursionError) as error:
            self.fail(f"has a header that is not JSON ({str(error)[:100] or type(error).__name__})")
        if not isinstance(header, dict):
            self.fail("has a header that is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.fail("has a __metadata__ that is not an object of strings")
        entries = {name: self._entry(name, record, 8 + length) for name, record in header.items()}
        # Tensors must lie one after the other: neither do they overlap nor is anything hidden between them.
        end = 8 + length
        ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size))
        for name, entry in ordered:
            if entry.offset != end:
                self.fail(f"begins at byte {entry.offset:,}, not at {end:,}, where the one before ends", name)
            end += entry.size
        if end != total:
            self.fail(f"has {total:,} bytes, but its header describes {end:,}")
        return metadata, dict(ordered)

    def _entry(self, name: str, record: Any, start: int) -> Span:
        self.check_name(name)
        if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
            self.fail("has an entry that is not exactly dtype, shape and data_offsets", name)
        dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self.fail(f"has the dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}", name)
        if not is_shape(shape):
            self.fail(f"has the shape {str(shape)[:40]}, not up to {MOST_AXES} whole numbers", name)
        if not _are_offsets(offsets):
            self.fail(f"has the data_offsets {str(offsets)[:40]}, not two whole numbers", name)
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != size:
            self.fail(f"has {offsets[1] - offsets[0]:,} bytes where {dtype} of shape {shape} takes {size:,}", name)
        return Span(DTYPES[dtype], tuple(shape), start + offsets[0], size)

    def check_name(self, name: str) -> None:
        """Raise a StorageError for a name that could not stand for a path of keys."""
        problem = bad_name(name)
        if problem:
            self.fail(problem, name[:80])


def bad_name(name: str) -> str | None:
    """Say what is wrong with a tensor's name, which becomes keys of a tree and is printed; None if nothing is."""
    parts = name.split("/")
    if len(parts) > DEEPEST_NAME:
        return f"has a name of {len(parts)} parts; {DEEPEST_NAME} are the most"
    if name and any(part in ("", ".", "..") for part in parts):
        return "has a name like a file's path: a part of it is empty, '.' or '..'"
    if not name.isprintable():
        return "has a name with characters that cannot be printed"
    return None


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of dimensions of which NumPy can make an array."""
    if not isinstance(value, list) or len(value) > MOST_AXES:
        return False
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        return False
    # NumPy refuses an empty array whose other dimensions would be too many bytes.
    return math.prod(n for n in value if n) < 2**59


def _are_offsets(value: Any) -> bool:
    """Whether a JSON value is two positions in a file, of any size; that they lie within this one is seen later."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} stands there twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _version(file: BinaryIO) -> tuple[int, int]:
    """What changes when a file is written to: its size, and when that was."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _read_into(file: IO[bytes], data: np.ndarray) -> int:
    """Fill an array from a file; return the number of bytes found."""
    view, filled = data.data, 0
    while filled < len(view):
        got = file.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            break
        filled += got
    return filled
