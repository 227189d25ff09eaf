"""Models on disk without a model class: one safetensors file, or a folder of shards with an index."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from jaxprune.storage import _atomic, _writer
from jaxprune.storage._container import LONGEST_HEADER, StorageError, TensorFile
from jaxprune.storage._tensors import OWN_METADATA, Encoded, Stored, own_metadata, tensors
from jaxprune.storage._trees import Saved, TensorRow, version

INDEX_ENDING = ".safetensors.index.json"

# What becomes of a tensor; asked twice of each, so that no more than one need be in memory.
Encode = Callable[[Stored], Encoded]


class Checkpoint:
    """The tensors of a file or of a folder of shards, read one at a time; a context manager.

    Attributes:
        path: the file or folder.
        files: the open shards by file name; a single file has one.
        tensors: the model's tensors by name, in the order of their names.
        index: the name of the folder's index, or None.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open every shard and read its header; raise a StorageError where they do not make one model."""
        self.path = Path(path)
        self.files: dict[str, TensorFile] = {}
        self.tensors: dict[str, Stored] = {}
        self.index: str | None = None
        try:
            shards, expected = self._shards()
            for shard in shards:
                self.files[shard.name] = TensorFile(shard)
            found: dict[str, str] = {}
            for shard_name, file in self.files.items():
                for name, tensor in tensors(file).items():
                    if name in self.tensors:
                        file.fail("is in another shard as well", name)
                    self.tensors[name] = tensor
                found |= dict.fromkeys(file.entries, shard_name)
            if expected is not None and expected != found:
                name = min(name for name in expected.keys() | found if expected.get(name) != found.get(name))
                self._fail(f"says that tensor {name!r} is in {expected.get(name)}, but it is in {found.get(name)}")
        except BaseException:
            self.close()
            raise
        self.tensors = dict(sorted(self.tensors.items()))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every shard; raise a StorageError where one has changed since it was opened."""
        try:
            if error is None:
                self.require_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        """Close every shard."""
        for file in self.files.values():
            file.close()

    def require_unchanged(self) -> None:
        """Raise a StorageError where a shard was written to since it was opened."""
        for file in self.files.values():
            file.require_unchanged()

    def check_target(self, target: Path, force: bool) -> None:
        """Raise a ValueError where this model, written anew to `target`, would replace itself or what is no file.

        What else is there already is a FileExistsError, unless `force` says to replace it.
        """
        names = (*self.files, self.index_name) if self.path.is_dir() else ()
        for path in [target / name for name in names] or [target]:
            _atomic.require_file(path)
            self.require_apart(path)
        _atomic.require_new(target, force)

    def require_apart(self, path: Path) -> None:
        """Raise a ValueError where `path` is a file of this model, by whatever name or link."""
        for source in (*self.files, *([] if self.index is None else [self.index])):
            read = self.path / source if self.path.is_dir() else self.path
            if path.exists() and path.samefile(read):
                raise ValueError(f"{path} is {read} itself, which is read to write it; name another output.")

    @property
    def index_name(self) -> str:
        """The name of the index of a folder that this model is written to."""
        return self.index or "model" + INDEX_ENDING

    @property
    def metadata(self) -> dict[str, str]:
        """The strings of the first header, without this package's own record."""
        first = next(iter(self.files.values()))
        return {name: text for name, text in first.metadata.items() if name != OWN_METADATA}

    @property
    def stored_bytes(self) -> int:
        """The bytes on disk."""
        return sum(file.stored for file in self.files.values())

    def _shards(self) -> tuple[list[Path], dict[str, str] | None]:
        """Return the files to open, and the shard of every tensor if there is an index."""
        if not self.path.is_dir():
            return [self.path], None
        indices = sorted(self.path.glob("*" + INDEX_ENDING))
        if len(indices) > 1:
            raise StorageError(f"{self.path} has {len(indices)} files *{INDEX_ENDING}; name the folder of one model.")
        if not indices:
            shards = sorted(self.path.glob("*.safetensors"))
            if not shards:
                raise StorageError(f"{self.path} is a folder without *.safetensors files.")
            return shards, None
        self.index = indices[0].name
        weight_map = self._read_index(indices[0])
        return [self.path / name for name in sorted(set(weight_map.values()))], weight_map

    def _read_index(self, path: Path) -> dict[str, str]:
        if path.stat().st_size > LONGEST_HEADER:
            self._fail(f"is longer than {LONGEST_HEADER:,} bytes")
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            self._fail(f"has no weight_map ({type(error).__name__})")
        if not isinstance(weight_map, dict) or not weight_map:
            self._fail("has a weight_map that is empty or not an object")
        for name, shard in weight_map.items():
            # A shard lies in the folder itself: an index must not make anyone read other files.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                self._fail(f"puts tensor {name[:80]!r} in {str(shard)[:80]!r}, which is not a *.safetensors file name")
            if not (self.path / shard).is_file():
                self._fail(f"names {shard!r}, which is not in the folder")
        return weight_map

    def _fail(self, what: str) -> NoReturn:
        raise StorageError(f"{self.path / (self.index or '')}: {what}.")


@dataclasses.dataclass(frozen=True)
class Writing:
    """What a model is to become: known in full, but for the bytes after zstd, before anything is written.

    Attributes:
        rows: what each tensor becomes.
        shards: the chunks and the metadata of each file to write.
        index: the name of the folder's index; None for a single file.
        weight_map: the shard of every tensor in the files.
        compress: whether the files pass through zstd.
        check: called when all of a file is written, before it takes its place; what it raises leaves the old one there.
    """

    rows: tuple[TensorRow, ...]
    shards: Mapping[str, tuple[Sequence[_writer.Chunk], Mapping[str, str]]]
    index: str | None
    weight_map: Mapping[str, str]
    compress: bool
    check: Callable[[], None]

    def write(self, target: Path) -> Saved:
        """Write a file, or a folder (made if it is not there) with the index last; each file whole or not at all."""
        size = 0
        if self.index is not None:
            target.mkdir(parents=True, exist_ok=True)
        for shard, (chunks, metadata) in self.shards.items():
            path = target if self.index is None else target / shard
            size += _writer.write(path, chunks, metadata, compress=self.compress, check=self.check)
        if self.index is not None:
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(self.weight_map.items()))}
            with _atomic.replacing(target / self.index) as out:
                out.write(json.dumps(index, indent=2).encode() + b"\n")
        return Saved(target, size, sum(row.dense_bytes for row in self.rows), self.rows)


def plan(
    source: Checkpoint,
    encode: Encode,
    *,
    metadata: Mapping[str, str],
    compress: bool = False,
    done: Callable[[str], None] = lambda tensor: None,
) -> Writing:
    """Plan to write a model anew, tensor by tensor, in as many shards as it has; `source` stays open for the writing.

    Args:
        source: the model.
        encode: what becomes of each tensor; called now to learn the sizes, and again when it is written.
        metadata: strings for every header.
        compress: whether the files pass through zstd.
        done: called with the name of each tensor, both times it has been encoded.

    Returns:
        What is to be written; its `write` writes.
    """
    rows: list[TensorRow] = []
    shards: dict[str, tuple[Sequence[_writer.Chunk], Mapping[str, str]]] = {}
    weight_map: dict[str, str] = {}
    for shard, file in source.files.items():
        chunks: list[_writer.Chunk] = []
        members: dict[str, Iterable[str]] = {}
        for name, tensor in source.tensors.items():
            if tensor.file is not file:
                continue
            encoded = encode(tensor)
            rows.append(_row(tensor, encoded))
            specs = {part: _writer.Spec(array.dtype, array.shape) for part, array in encoded.arrays.items()}
            del encoded  # nothing of a tensor outlives its turn
            chunks.append(_writer.Chunk(specs, _again(encode, tensor, done)))
            members[name] = specs
            weight_map |= dict.fromkeys(specs, shard)
            done(tensor.name)
        shards[shard] = chunks, {**metadata, **own_metadata(version(), members)}
    index = source.index_name if source.path.is_dir() else None
    return Writing(tuple(rows), shards, index, weight_map, compress, source.require_unchanged)


def _again(encode: Encode, tensor: Stored, done: Callable[[str], None]) -> Callable[[], _writer.Arrays]:
    def make() -> _writer.Arrays:
        arrays = encode(tensor).arrays
        done(tensor.name)
        return arrays

    return make


def _row(tensor: Stored, encoded: Encoded) -> TensorRow:
    return TensorRow(
        path=tensor.name,
        shape=tensor.shape,
        dtype=str(encoded.dtype),
        bits=encoded.bits,
        size=tensor.count,
        kept=encoded.kept,
        dense_bytes=tensor.count * tensor.dtype.itemsize,
        stored_bytes=sum(array.nbytes for array in encoded.arrays.values()),
        largest_error=encoded.largest_error,
        relative_error=encoded.relative_error,
    )
