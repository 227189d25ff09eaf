"""Parameters and masks of any pytree to one file and back."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._printing import Printable, in_order, some
from jaxprune._rows import Row
from jaxprune._tree._axes import Stacked, read_axes
from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import Tree, flatten
from jaxprune.oneshot import Codes
from jaxprune.storage import _atomic, _writer
from jaxprune.storage._coding import Coding, read_coding
from jaxprune.storage._container import NAMES, TensorFile, bad_name
from jaxprune.storage._tensors import OWN_METADATA, own_metadata, tensors

if TYPE_CHECKING:
    from jaxprune._tables import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRow(Row):
    """One tensor in a file.

    Attributes:
        path: its name in the file.
        shape: its shape.
        size: how many entries it has.
        kept: how many its mask keeps.
        threshold: the smallest magnitude kept; None where nothing is removed.
        std: of its entries; None where they are not floating-point.
        dense_bytes: of the array as it is.
        stored_bytes: in the file, kept values with a bitmask where it was pruned; before zstd.
        dtype: of its values.
        bits: of one value as it is stored.
        largest_error: of quantising it, or of rounding it to another dtype; 0.0 without.
        relative_error: the same, relative to its root mean square.
    """

    dtype: str
    bits: int
    largest_error: float = 0.0
    relative_error: float = 0.0

    @property
    def stored_dtype(self) -> str:
        """The dtype of its values, and the integers that they are stored as, if they are."""
        whole = self.bits == 8 * np.dtype(self.dtype).itemsize
        return self.dtype if whole else f"{self.dtype}, int{self.bits}"


@dataclasses.dataclass(frozen=True, repr=False)
class Saved(Printable):
    """What `save_sparse` wrote; prints as a table.

    Attributes:
        path: the file.
        bytes: those on disk.
        dense_bytes: those of the dense arrays.
        tensors: a row for each leaf.
    """

    path: Path
    bytes: int
    dense_bytes: int
    tensors: tuple[TensorRow, ...]

    @property
    def compression(self) -> float:
        """How many times smaller than the dense arrays the file is."""
        return self.dense_bytes / self.bytes

    def _in_short(self) -> str:
        return f"{self.path}, {self.bytes:,} bytes, dense {self.dense_bytes:,}"

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title=self._in_short(), title_justify="left")
        table.add_column("tensor", overflow="fold")
        inexact = any(row.relative_error for row in self.tensors)
        for column in ("shape", "dtype", "kept", "sparsity", "bytes", *(["error"] if inexact else [])):
            table.add_column(column, justify="right")
        for row in in_order(self.tensors, lambda row: row.path):
            table.add_row(
                row.path,
                " x ".join(map(str, row.shape)),
                row.stored_dtype,
                f"{row.kept:,}",
                f"{row.sparsity:.2%}" if row.kept < row.size else "",
                f"{row.stored_bytes:,}",
                *([f"{row.relative_error:.2%}" if row.relative_error else ""] if inexact else []),
            )
        return table


def save_sparse(
    path: str | os.PathLike[str],
    params: Any,
    masks: Any = None,
    *,
    metadata: Mapping[str, str] | None = None,
    codes: Mapping[str, Codes] | None = None,
    quantize: int | None = None,
    quantize_tables: int | None = None,
    group_size: int | None = None,
    stacked: Stacked = None,
    dtype: str | None = None,
    compress: bool = False,
    force: bool = False,
) -> Saved:
    """Save parameters and their masks in one safetensors file that holds the kept weights alone.

    A leaf with pruned weights is stored in the layout ``sparse-bitmask`` of compressed-tensors (read and written by its
    releases up to 0.14): the kept values, a bit for every weight, the shape, the row offsets. The mask is stored, not
    guessed from zeros: a kept weight of zero stays kept. Other leaves are stored plain. The file appears whole or not at
    all, whatever stops the process. Values are kept bit for bit unless they are to be quantised or rounded.

    Args:
        path: the file; one that is there already is replaced only by `force`.
        params: a pytree of arrays. Leaves are named by their paths, ``block/dense/kernel``. Dtypes: float of 8
            (e4m3fn, e5m2), 16, 32 and 64 bits, bfloat16, integers of 8 to 64 bits, bool, complex64.
        masks: their masks, as `apply_masks` takes them; None stores every leaf plain.
        metadata: strings for the file's header, such as the rule and its k; `read_metadata` returns them.
        codes: by path, the integers that leaves were rounded to by `oneshot.gptq` or `oneshot.prune_and_quantize`; they are stored
            as they are, two to four bits packed, and load as the values that they stand for. Other leaves are stored as the other
            arguments say.
        quantize: 8 or 4 to store kernels (see `is_kernel`) and pruned leaves of real numbers as integers of so many bits, symmetric,
            with one scale for each output channel; None to keep every value.
        quantize_tables: the same for tables of embeddings and positions, known by their names, with one scale for each row.
        group_size: how many inputs of a channel, or entries of a row, share a scale at most, such as 64 or 128; None for all.
            An axis of n entries is cut into ``ceil(n / group_size)`` groups of one length but for the last, and the number
            of its scales says so in the file. An axis of inputs that is shorter shares a scale with the one before.
        stacked: which leaves hold one layer for each index of their first axis, as in `make_masks`: each layer then has scales of
            its own, rather than all layers those of the largest weights among them.
        dtype: "bfloat16", "float16" or "float32": what floating-point leaves of more bits are rounded to, and the scales of
            quantised ones, so that all of them load as that; None to keep each leaf's own.
        compress: whether to pass the file through zstd (needs ``jaxprune[storage]``). It then leaves out the row
            offsets, and ``zstd -d`` makes a plain safetensors file of it.
        force: whether to replace a file that is there already, which then keeps its owner, group and permissions.

    Returns:
        A `Saved`: bytes, and for each leaf what is kept and the errors of quantising.

    Raises:
        ValueError: codes are of no leaf, of another shape, or keep what masks prune; a mask does not fit or prunes a leaf that is not floating-point; a dtype or a name cannot be stored; a pattern
            of `stacked` fits nothing, or a leaf has fewer axes than it should have layers;
            a leaf to quantise is not finite, or one to round too large. The message names the leaf. Or there is no table to
            quantise, or `path` is a device, a pipe or a folder.
        TypeError: a leaf is no array, or metadata are not strings.
        FileExistsError: the file is there already, and `force` is False.

    >>> import jax.numpy as jnp, tempfile
    >>> params = {"kernel": jnp.array([[0.0, 2.0], [5.0, 0.0]])}
    >>> masks = {"kernel": jnp.array([[True, True], [False, False]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_sparse(folder + "/model.safetensors", params, masks)
    ...     params, masks = load_sparse(folder + "/model.safetensors")
    >>> saved.tensors[0].kept, params["kernel"].tolist(), masks["kernel"].tolist()
    (2, [[0.0, 2.0], [0.0, 0.0]], [[True, True], [False, False]])
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"save_sparse(path, params, masks) was given {described(path)} where the path belongs.")
    coding = read_coding(quantize, quantize_tables, group_size, dtype, compress=compress)
    strings = check_metadata(metadata)
    _atomic.require_file(Path(path))
    _atomic.require_new(Path(path), force)
    chunks, header, rows = encode_tree(params, masks, codes=codes, stacked=stacked, coding=coding)
    size = _writer.write(Path(path), chunks, strings | header, compress=compress)
    return Saved(Path(path), size, sum(row.dense_bytes for row in rows), tuple(rows))


def encode_tree(
    params: Any, masks: Any, *, codes: Mapping[str, Codes] | None, stacked: Stacked, coding: Coding
) -> tuple[list[_writer.Chunk], dict[str, str], list[TensorRow]]:
    """Encode a tree as `save_sparse` does; return what to write, the header's own strings, and a row for each leaf."""
    flat = flatten(params, "params")
    flat.require_arrays()
    stacks = [axes.stack for axes in read_axes(flat, stacked)]
    fitting = [None] * len(flat.paths) if masks is None else align_masks(masks, flat)
    if "" in flat.paths and len(flat.paths) > 1:
        raise ValueError(f"{flat.names[flat.paths.index('')]} has an empty path beside other leaves; rename it.")
    codes = {} if codes is None else codes
    for path_, found in codes.items():
        if path_ not in flat.by_path or not isinstance(found, Codes):
            raise ValueError(
                f"codes has for {path_!r} {described(found)}, and params {some(flat.paths)}. Codes are by path."
            )
    coding.check_tables(zip(flat.paths, flat.leaves, strict=True), "params")
    chunks, rows = [], []
    members: dict[str, Iterable[str]] = {}
    for path_, name, leaf, mask, stack in zip(flat.paths, flat.names, flat.leaves, fitting, stacks, strict=True):
        values, kept = as_numpy(name, path_, leaf, mask)
        encoded = coding.encode(path_, values, kept, stack=stack, codes=codes.get(path_), title=name)
        members[path_] = encoded.arrays
        chunks.append(_writer.ready(encoded.arrays))
        rows.append(
            TensorRow(
                path=path_,
                shape=values.shape,
                dtype=str(encoded.dtype),
                bits=encoded.bits,
                size=values.size,
                kept=encoded.kept,
                dense_bytes=values.nbytes,
                stored_bytes=sum(array.nbytes for array in encoded.arrays.values()),
                largest_error=encoded.largest_error,
                relative_error=encoded.relative_error,
            )
        )
    return chunks, own_metadata(version(), members), rows


def load_sparse(path: str | os.PathLike[str], *, like: Any = None) -> tuple[Any, Any]:
    """Load what `save_sparse` saved, or any file in that layout, or any plain safetensors file.

    Nothing in the file is executed, and no more memory is taken than its size warrants: 64 times its bytes at most (a
    compressed file may expand a thousandfold).

    Args:
        path: the file.
        like: a tree with the same paths, whose leaves (arrays or ``jax.ShapeDtypeStruct``) have the shapes and dtypes
            to expect: the results have its treedef, and the shardings of its arrays. None makes nested dicts, whose
            keys are the parts of the names between slashes.

    Returns:
        The parameters, zero where they are pruned, and their masks, True = keep; a leaf that was stored plain is all
        True. Leaves of 64 bits that JAX would cut to 32 stay NumPy arrays.

    Raises:
        StorageError: the file is damaged or is no such file; a subclass of ValueError.
        ValueError: the file does not fit `like`; the message names the leaf.

    >>> import jax.numpy as jnp, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_sparse(folder + "/model.safetensors", (jnp.arange(3.0), jnp.zeros(2)))
    ...     params, masks = load_sparse(folder + "/model.safetensors", like=(jnp.zeros(3), jnp.zeros(2)))
    >>> params[0].tolist(), masks[1].tolist()
    ([0.0, 1.0, 2.0], [True, True])
    """
    with TensorFile(path) as file:
        stored = tensors(file)
        if like is None:
            check_nesting(file, list(stored))
            pairs = {name: to_arrays(*tensor.load()) for name, tensor in stored.items()}
            return nest({name: pair[0] for name, pair in pairs.items()}), nest(
                {name: pair[1] for name, pair in pairs.items()}
            )
        flat = flatten(like, "like")
        check_like(file.path, {name: (t.shape, t.dtype) for name, t in stored.items()}, flat)
        loaded = [to_arrays(*stored[name].load(), leaf) for name, leaf in zip(flat.paths, flat.leaves, strict=True)]
    params, masks = zip(*loaded, strict=True) if loaded else ((), ())
    return flat.build(params), flat.build(masks)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings in the header of a safetensors file: those given to `save_sparse`.

    Args:
        path: the file.

    Returns:
        The strings by name.

    Raises:
        StorageError: the file is damaged.

    >>> import jax.numpy as jnp, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = save_sparse(folder + "/model.safetensors", {"w": jnp.zeros(2)}, metadata={"rule": "n_m", "k": "2"})
    ...     read_metadata(folder + "/model.safetensors")
    {'rule': 'n_m', 'k': '2'}
    """
    with TensorFile(path) as file:
        return {name: text for name, text in file.metadata.items() if name != OWN_METADATA}


def version() -> str:
    """The version of this package, or an empty string where it is not installed."""
    try:
        return importlib_metadata.version("jaxprune")
    except importlib_metadata.PackageNotFoundError:
        return ""


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return metadata as a dict of strings; raise a TypeError or ValueError for anything else."""
    strings = dict(metadata or {})
    for name, text in strings.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(
                f"metadata are strings by name, but {name!r} is {text!r}. Convert it, by str or json.dumps."
            )
        if name == OWN_METADATA:
            raise ValueError(f"the name {name!r} in metadata is taken by the file's own record; choose another.")
    return strings


def as_numpy(name: str, path: str, leaf: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    problem = bad_name(path)
    if problem:
        raise ValueError(f"{name} {problem}; rename it.")
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"{name} is traced; save outside jit.")
    if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended):
        raise ValueError(f"{name} is a PRNG key; store jax.random.key_data(key).")
    values = np.asarray(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype not in NAMES:
        raise ValueError(f"{name} is {values.dtype}, which a safetensors file cannot hold; cast it.")
    if mask is None:
        return values, None
    kept = np.asarray(mask)
    if not is_floating(values) and not kept.all():
        raise ValueError(f"masks prunes {name}, which is {values.dtype}; only floating-point leaves are pruned.")
    return values, kept


def to_arrays(values: np.ndarray, mask: np.ndarray | None, like: Any = None) -> tuple[Any, jax.Array]:
    """Put values and mask where `like` is, if it is an array; unlike jnp.asarray, this compiles nothing for a shape."""
    sharding = like.sharding if isinstance(like, jax.Array) else None
    kept = jax.device_put(np.ones(values.shape, bool) if mask is None else mask, sharding)
    exact = jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype
    return (jax.device_put(values, sharding) if exact else values), kept


def check_like(path: Path, stored: Mapping[str, tuple[tuple[int, ...], Any]], flat: Tree) -> None:
    for name, leaf_path, leaf in zip(flat.names, flat.paths, flat.leaves, strict=True):
        if leaf_path not in stored:
            raise ValueError(f"{path} has no tensor {leaf_path!r} for {name}; it has {_some(stored)}.")
        shape, dtype = stored[leaf_path]
        wanted = getattr(leaf, "dtype", None)
        if shape != np.shape(leaf) or (wanted is not None and dtype != wanted):
            raise ValueError(
                f"{path} has for {name} an array of {dtype}{list(shape)}, not of {wanted}{list(np.shape(leaf))}. "
                "Give like= the shapes and dtypes that were saved."
            )
    extra = stored.keys() - set(flat.paths)
    if extra:
        raise ValueError(f"{path} has tensors that like= has no leaf for: {_some(sorted(extra))}.")


def _some(names: Any) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "") if shown else "none"


def check_nesting(file: TensorFile, names: list[str]) -> None:
    """Raise a StorageError where one name is a module of another: a dict cannot hold both."""
    clash = inside_of(names)
    if clash is not None:
        file.fail(f"lies inside another tensor, {clash[1]!r}", clash[0])
    if "" in names and len(names) > 1:
        file.fail("has no name, which only the one tensor of a file may be", "")


def inside_of(names: Sequence[str]) -> tuple[str, str] | None:
    """Return a name of which another is a module, and that other, if there are such."""
    known = set(names)
    for name in names:
        parts = name.split("/")
        for above in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
            if above in known:
                return name, above
    return None


def nest(flat: Mapping[str, Any]) -> Any:
    if "" in flat:
        return flat[""]
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *modules, last = name.split("/")
        within = tree
        for module in modules:
            within = within.setdefault(module, {})
        within[last] = leaf
    return tree
