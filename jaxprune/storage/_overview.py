"""What a model on disk holds, and how two models differ, one tensor in memory at a time."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune._printing import Printable, in_order
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune.storage._checkpoint import Checkpoint
from jaxprune.storage._files import Done, counts, nonzero
from jaxprune.storage._tensors import Stored
from jaxprune.storage._trees import TensorRow

if TYPE_CHECKING:
    from jaxprune._tables import Table

_PIECE = 2**20  # entries of a tensor that are looked at together


@dataclasses.dataclass(frozen=True, repr=False)
class FileOverview(Printable):
    """What `summarize_file` found.

    Attributes:
        path: the file or folder.
        bytes: those on disk.
        dense_bytes: those of all tensors as arrays.
        size: the entries of all tensors.
        kept: those of them that are kept.
        sparsity: the fraction removed of all.
        prunable_sparsity: that of the kernels (see `is_kernel`) and of what lies under a mask.
        metadata: the strings in the header.
        tensors: a row for each.
    """

    path: str
    bytes: int
    dense_bytes: int
    size: int
    kept: int
    sparsity: float
    prunable_sparsity: float
    metadata: dict[str, str]
    tensors: tuple[TensorRow, ...]

    def _in_short(self) -> str:
        return f"{self.path}, {self.bytes:,} bytes, {self.prunable_sparsity:.2%} of the prunable weights removed"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "tensors": [row.to_dict() for row in self.tensors]}

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title=self.path, title_justify="left", padding=(0, 0, 0, 1))
        table.add_column("tensor", overflow="fold")
        for column in ("shape", "dtype", "threshold", "std", "kept", "sparsity", "bytes"):
            table.add_column(column, justify="right")
        for row in in_order(self.tensors, lambda row: row.path):
            figures = ("" if value is None else f"{value:.4g}" for value in (row.threshold, row.std))
            share = f"{row.sparsity:.2%}" if row.kept < row.size else ""
            shape = " x ".join(map(str, row.shape))
            table.add_row(row.path, shape, row.stored_dtype, *figures, f"{row.kept:,}", share, f"{row.stored_bytes:,}")
        table.add_section()
        table.add_row("prunable weights", "", "", "", "", "", f"{self.prunable_sparsity:.2%}", "")
        table.add_row("all", "", "", "", "", f"{self.kept:,}", f"{self.sparsity:.2%}", f"{self.bytes:,}")
        return table


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs, by `diff_files`.

    Attributes:
        name: the tensor's.
        what: the difference in words.
        different: of tensors of equal shapes, how many entries differ.
        largest: by how much at most.
    """

    name: str
    what: str
    different: int
    largest: float


def summarize_file(path: str | os.PathLike[str], *, done: Done = lambda name: None) -> FileOverview:
    """Summarise a model on disk: what each tensor keeps, its smallest kept magnitude, its bytes.

    Masks are those stored. In a plain tensor that is a kernel (see `is_kernel`) zeros count as pruned.

    Args:
        path: a safetensors file, plain or written by `save_sparse`, or a folder of shards with their index.
        done: called with the name of each tensor once it has been read.

    Returns:
        A `FileOverview`: a row for each tensor, and totals.

    Raises:
        StorageError: the model is damaged.
    """
    with Checkpoint(path) as checkpoint:
        rows, counted = [], []
        for tensor in checkpoint.tensors.values():
            rows.append(_overview(tensor))
            counted += rows[-1:] if counts(tensor) else []
            done(tensor.name)
        prunable = sum(row.size for row in counted)
        size, kept = sum(row.size for row in rows), sum(row.kept for row in rows)
        return FileOverview(
            path=str(path),
            bytes=checkpoint.stored_bytes,
            dense_bytes=sum(row.dense_bytes for row in rows),
            size=size,
            kept=kept,
            sparsity=1 - kept / size if size else 0.0,
            prunable_sparsity=1 - sum(row.kept for row in counted) / prunable if prunable else 0.0,
            metadata=checkpoint.metadata,
            tensors=tuple(rows),
        )


def _overview(tensor: Stored) -> TensorRow:
    values, mask = tensor.load()
    mask = mask if tensor.encoded else nonzero(tensor, values)
    kept = values.size if mask is None else int(np.count_nonzero(mask))
    threshold = std = None
    if is_floating(values) and values.size:
        std = _std(values)
        if mask is not None and 0 < kept < values.size:
            threshold = min(
                float(np.min(np.abs(piece), where=stays, initial=np.inf)) for piece, stays in _pieces(values, mask)
            )
    return TensorRow(
        path=tensor.name,
        shape=tensor.shape,
        dtype=str(tensor.dtype),
        size=values.size,
        kept=kept,
        threshold=threshold,
        std=std,
        bits=tensor.bits,
        dense_bytes=values.nbytes,
        stored_bytes=tensor.size,
    )


def _pieces(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Cut arrays of one shape into pieces, of which a float64 copy costs little; floats are float32 at least."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _PIECE):
        cut = (array[start : start + _PIECE] for array in flat)
        yield tuple(
            piece.astype(np.promote_types(piece.dtype, np.float32), copy=False) if is_floating(piece) else piece
            for piece in cut
        )


def _std(values: np.ndarray) -> float:
    # Of complex numbers the root mean square distance from their mean, as the rules take it.
    double = np.promote_types(np.float64, values.dtype) if is_complex(values) else np.dtype(np.float64)
    mean = sum(np.sum(piece, dtype=double) for (piece,) in _pieces(values)) / values.size
    squares = sum(float(np.sum(np.square(np.abs(piece - double.type(mean))))) for (piece,) in _pieces(values))
    return math.sqrt(squares / values.size)


def diff_files(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, done: Callable[[str], None] = lambda name: None
) -> list[TensorDifference]:
    """Compare two models on disk, tensor by tensor, in whatever layout each is stored.

    Values are compared bit for bit but for the sign of a zero; two NaN are equal. Masks are compared where both models
    store one.

    Args:
        a: a safetensors file, plain or written by `save_sparse`, or a folder of shards with their index.
        b: another.
        done: called with each name once its tensors have been compared.

    Returns:
        One entry for each tensor that differs, by name; an empty list for equal models.

    Raises:
        StorageError: a model is damaged.
    """
    found = []
    with Checkpoint(a) as first, Checkpoint(b) as second:
        for name in sorted(first.tensors.keys() | second.tensors.keys()):
            if name not in second.tensors:
                found.append(TensorDifference(name, "only in the first", first.tensors[name].count, 0.0))
            elif name not in first.tensors:
                found.append(TensorDifference(name, "only in the second", second.tensors[name].count, 0.0))
            else:
                found.extend(_differences(name, first.tensors[name], second.tensors[name]))
            done(name)
    return found


def _differences(name: str, a: Stored, b: Stored) -> Iterator[TensorDifference]:
    if a.shape != b.shape or a.dtype != b.dtype:
        what = f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
        yield TensorDifference(name, what, max(a.count, b.count), 0.0)
        return
    (values, mask), (others, other_mask) = a.load(), b.load()
    count, largest = 0, 0.0
    wide = np.promote_types(values.dtype, np.complex128 if values.dtype.kind == "c" else np.float64)
    for x, y in _pieces(values, others):
        # A NaN differs from itself, and is equal here to another NaN.
        different = (x != y) & ~((x != x) & (y != y))
        if different.any():
            count += int(np.count_nonzero(different))
            # The largest is NaN where one of the two values is.
            largest = float(np.maximum(largest, np.max(np.abs(x[different].astype(wide) - y[different].astype(wide)))))
    masks = 0 if mask is None or other_mask is None else int(np.count_nonzero(mask != other_mask))
    if not count and not masks:
        return
    words = [f"{count:,} values differ"] if count else []
    words += [f"{masks:,} mask bits differ"] if masks else []
    yield TensorDifference(name, ", ".join(words), max(count, masks), largest)
