"""A model's tensors and the tensors of a file that stand for each: plain, under a bitmask, as small integers."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxprune.oneshot import Codes
from jaxprune.storage import _bitmask, _quantize
from jaxprune.storage._container import TensorFile, is_shape

# compressed-tensors leaves this ending of a name out when it compresses, and puts it back.
WEIGHT = ".weight"
OWN_METADATA = "jaxprune"
PARTS = ("shape", "compressed", "bitmask", "row_offsets", "scale", "zero_point", "bits")
ONLY_PARTS = ("compressed", "bitmask", "row_offsets")  # endings that no other tensor may have
BITS = (4, 8)
PACKED = (2, 3, 4)  # bits of codes of which several share a byte; other codes take a byte each


class Encoded(NamedTuple):
    """What one tensor becomes in a file.

    Attributes:
        arrays: by their names in the file.
        dtype: of its values when they are loaded.
        kept: how many weights they hold.
        bits: of one value as it is stored.
        largest_error: by quantising or by rounding to another dtype; 0.0 where nothing was.
        relative_error: the same as a root mean square over that of the weights.
    """

    arrays: dict[str, np.ndarray]
    dtype: np.dtype[Any]
    kept: int
    bits: int
    largest_error: float = 0.0
    relative_error: float = 0.0


def encode(
    name: str,
    values: np.ndarray,
    mask: np.ndarray | None,
    *,
    bits: int | None = None,
    scales: tuple[int, ...] = (),
    dtype: np.dtype[Any] | None = None,
    exchange: bool = True,
    codes: Codes | None = None,
    title: str | None = None,
) -> Encoded:
    """Encode one tensor.

    Args:
        name: its name.
        values: what it holds.
        mask: bool, True = keep, or None; one that keeps everything is not stored.
        bits: 4 or 8 to quantise the kept values, None to keep them as they are.
        scales: the number of scales along each axis; for quantising.
        dtype: to round the values, or the scales, to; None for their own.
        exchange: whether to store what can be computed from the bitmask but belongs to the layout of others.
        codes: the integers that its values were rounded to already; they are stored as they are.
        title: what messages call it; its name when None.
    """
    if mask is not None and mask.all():
        mask = None
    kept = values.size if mask is None else int(np.count_nonzero(mask))
    dtype = dtype or values.dtype
    largest_error = relative_error = 0.0
    scale = zero = None
    if mask is not None and (bits is not None or codes is not None or dtype != values.dtype):
        values = np.where(mask, values, np.zeros_like(values))
    if codes is not None:
        bits, exact = codes.bits, values
        values, scale, zero = read_codes(codes, mask, dtype, exact.shape, title or name)
        largest_error, relative_error = _quantize.errors(exact, _quantize.dequantize(values, scale, zero))
    elif bits is not None:
        values, scale, largest_error, relative_error = _quantize.quantize(values, scales, bits, dtype)
        if not np.isfinite(largest_error):
            raise ValueError(f"{title or name} holds NaN or infinity, which has no integer code. Do not quantise it.")
    elif dtype != values.dtype:
        values, largest_error, relative_error = _rounded(values, dtype, title or name)
    stored = 8 * values.dtype.itemsize if bits not in PACKED else bits
    if scale is None and mask is None:
        return Encoded({name: values}, dtype, kept, stored, largest_error, relative_error)
    if mask is None:
        parts = {"shape": np.array(values.shape, np.int64), "compressed": values.reshape(-1)}
    else:
        parts = _bitmask.encode(values, mask)
        if not exchange:
            del parts["row_offsets"]
    if scale is not None:
        assert bits is not None
        if bits in PACKED:
            parts["compressed"] = _quantize.pack(parts["compressed"], bits)
        if bits in PACKED and bits != 4:
            parts["bits"] = np.array([bits], np.uint8)
        parts["scale"] = scale
    if zero is not None:
        parts["zero_point"] = zero
    stem = name.removesuffix(WEIGHT)
    arrays = {f"{stem}.{part}": array for part, array in parts.items()}
    return Encoded(arrays, dtype, kept, stored, largest_error, relative_error)


def read_codes(
    codes: Codes, mask: np.ndarray | None, dtype: np.dtype[Any], shape: tuple[int, ...], title: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The codes, their scales in the dtype that they are loaded in, and the codes of zero where any is not 0."""
    values, scale, zero = (np.asarray(part) for part in (codes.codes, codes.scale, codes.zero_point))
    if values.shape != shape:
        raise ValueError(f"codes has for {title} integers of shape {values.shape}; the leaf has {shape}.")
    if mask is not None and (values != _quantize.spread(zero, shape))[~mask].any():
        raise ValueError(f"codes of {title} keep weights that masks prune. Give the masks that they were found with.")
    narrow = scale.astype(dtype)
    if (narrow.astype(scale.dtype) != scale).any():
        raise ValueError(
            f"codes of {title} have scales that {dtype} cannot hold, as which the leaf is stored. Cast it to bfloat16 or float32."
        )
    return values, narrow, zero if zero.any() else None


def _rounded(values: np.ndarray, dtype: np.dtype[Any], title: str) -> tuple[np.ndarray, float, float]:
    """Round to a dtype of fewer bits, with the errors of what is finite; infinity and NaN stay."""
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    finite = np.isfinite(values)
    if not np.isfinite(found[finite]).all():
        most = float(np.max(np.abs(values[finite])))
        raise ValueError(f"{title} holds {most:.4g}, which is too large for {dtype}. Choose another dtype.")
    return found, *_quantize.errors(values[finite], found[finite])


def own_metadata(version: str, members: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Say in a header who wrote the file, and which names of encoded tensors end in ``.weight``.

    Args:
        version: of this package.
        members: by the name of each tensor, the names in the file of what it became.

    Raises:
        ValueError: a tensor's name would be read as a part of another.
    """
    encoded = [name for name, parts in members.items() if name not in parts]
    taken = {f"{name.removesuffix(WEIGHT)}.{part}": name for name in encoded for part in PARTS}
    for name in members:
        if name in taken or name.rpartition(".")[2] in ONLY_PARTS:
            owner = f"of {taken[name]!r}" if name in taken else "of another tensor"
            raise ValueError(f"the name {name!r} would be read as a part {owner}; rename it, or store the model dense.")
    weights = sorted(name.removesuffix(WEIGHT) for name in encoded if name.endswith(WEIGHT))
    return {OWN_METADATA: json.dumps({"version": version} | ({"weights": weights} if weights else {}))}


class Stored:
    """One tensor of a model as it lies in a file.

    Attributes:
        file: the file.
        name: the model's name for it.
        members: the names in the file, by part; the part of a plain tensor is ``""``.
        shape: its shape.
        dtype: its dtype, after dequantising.
        size: its bytes in the file.
    """

    def __init__(self, file: TensorFile, name: str, members: Mapping[str, str]) -> None:
        """Check that its members fit each other, as far as their shapes and dtypes tell."""
        self.name, self.members, self.file = name, members, file
        entries = {part: file.entries[member] for part, member in members.items()}
        self.size = sum(entry.size for entry in entries.values())
        if "" in entries:
            self.dtype, self.shape = entries[""].dtype, entries[""].shape
            return
        entry = entries["shape"]
        if entry.dtype != np.int64 or entry.shape not in ((math.prod(entry.shape),), (math.prod(entry.shape), 1)):
            self._fail(f"has a shape that is {entry.dtype}{list(entry.shape)}, not a vector of int64")
        shape = self._read("shape").reshape(-1).tolist()
        if not is_shape(shape):
            self._fail(f"has the shape {str(shape)[:60]}, which no array has")
        self.shape = tuple(shape)
        values = entries["compressed"].dtype
        if "scale" not in entries:
            self.dtype = values
            return
        self.dtype = entries["scale"].dtype
        fits = len(entries["scale"].shape) == len(shape) and all(
            map(_quantize.are_groups, entries["scale"].shape, shape)
        )
        zero = entries.get("zero_point")
        if zero is not None and (zero.dtype != np.int8 or zero.shape != entries["scale"].shape):
            self._fail(f"has a zero_point of {zero.dtype}{list(zero.shape)}, which does not fit its scale")
        bits = entries.get("bits")
        if bits is not None and (bits.dtype != np.uint8 or bits.shape != (1,) or self.bits not in PACKED):
            self._fail("has codes of so many bits as there are none of")
        if values not in (np.int8, np.uint8) or not fits or not _is_floating(self.dtype):
            scale = f"{self.dtype}{list(entries['scale'].shape)}"
            self._fail(f"of shape {shape} has codes of {values} and a scale of {scale}, which do not fit")

    @property
    def encoded(self) -> bool:
        """Whether it is more than a plain tensor."""
        return "" not in self.members

    @property
    def count(self) -> int:
        """The number of its weights, kept or pruned."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """The bits of one stored value."""
        if "bits" in self.members:
            return int(self._read("bits")[0])
        values = self.file.entries[self.members.get("compressed", self.members.get("", ""))].dtype
        return 4 if "scale" in self.members and values == np.uint8 else 8 * values.itemsize

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return its values, zero where they are pruned, and its mask (None where everything is kept)."""
        if not self.encoded:
            return self._read(""), None
        held, mask = self._held()
        if "scale" in self.members:
            zero = self._zero_point()
            held = _quantize.dequantize(held, self._read("scale"), zero)
            if mask is not None and zero is not None:
                held = np.where(mask, held, np.zeros_like(held))  # nothing is stored of what is pruned
        return held, mask

    def codes(self, mask: np.ndarray | None) -> Codes | None:
        """Return the integers that stand for its values, where it has any: NumPy arrays, scales of its dtype.

        Args:
            mask: what its own mask keeps, or less; None where it keeps everything.
        """
        if "scale" not in self.members:
            return None
        codes: Any = self._held()[0]
        scale: Any = self._read("scale")
        zero: Any = self._zero_point()
        if zero is None:
            zero = np.zeros(scale.shape, np.int8)
        if mask is not None:
            codes = np.where(mask, codes, _quantize.spread(zero, self.shape))
        return Codes(codes, scale, zero, self.bits)

    def _held(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Its values, or the codes of them, with zeros where nothing is stored, and its mask."""
        mask = self._mask()
        kept = math.prod(self.shape) if mask is None else int(np.count_nonzero(mask))
        values = self.file.entries[self.members["compressed"]]
        packed = self.bits in PACKED and "scale" in self.members
        if math.prod(values.shape) != (_quantize.packed_size(kept, self.bits) if packed else kept):
            self._fail(f"keeps {kept:,} weights, but holds values of {values.dtype}{list(values.shape)}")
        held = self._read("compressed").reshape(-1)
        if packed:
            held = _quantize.unpack(held, kept, self.bits)
        return held.reshape(self.shape) if mask is None else _bitmask.decode(held, mask), mask

    def _zero_point(self) -> np.ndarray | None:
        return self._read("zero_point") if "zero_point" in self.members else None

    def _mask(self) -> np.ndarray | None:
        if "bitmask" not in self.members:
            return None
        bits = self._read("bitmask")
        try:
            mask = _bitmask.decode_mask(self.shape, bits)
        except ValueError as error:
            self._fail(f"has {error}")
        if "row_offsets" in self.members and not np.array_equal(self._read("row_offsets"), _bitmask.row_offsets(bits)):
            self._fail("has row_offsets that disagree with its bitmask")
        return mask

    def _read(self, part: str) -> np.ndarray:
        return self.file.read(self.members[part])

    def _fail(self, what: str) -> Any:
        self.file.fail(what, self.name)


def tensors(file: TensorFile) -> dict[str, Stored]:
    """Find the model's tensors in a file, by name; raise a StorageError where parts of one are missing."""
    ending = _endings(file)
    found: dict[str, Stored] = {}
    used: set[str] = set()
    for member in file.entries:
        stem, dot, part = member.rpartition(".")
        if not dot or part != "compressed":
            continue
        members = {part: f"{stem}.{part}" for part in PARTS if f"{stem}.{part}" in file.entries}
        if "shape" not in members or not members.keys() & {"bitmask", "scale"}:
            file.fail(f"stands without {stem + '.shape'!r} and {stem + '.bitmask'!r}", member)
        name = stem + (WEIGHT if ending is None or stem in ending else "")
        found[name] = Stored(file, name, members)
        used.update(members.values())
    for member in file.entries.keys() - used:
        if member.rpartition(".")[2] in ONLY_PARTS:
            file.fail(f"stands without {member.rpartition('.')[0] + '.compressed'!r}", member)
        if member in found:
            file.fail("is there twice, plain and encoded", member)
        found[member] = Stored(file, member, {"": member})
    return {name: found[name] for name in sorted(found)}


def _endings(file: TensorFile) -> set[str] | None:
    """Return the stems to which ``.weight`` belongs; None for a file of compressed-tensors, where it always does."""
    text = file.metadata.get(OWN_METADATA)
    if text is None:
        return None
    try:
        weights = json.loads(text).get("weights", [])
        return {str(stem) for stem in weights}
    except (ValueError, TypeError, AttributeError, RecursionError):
        file.fail(f"has a metadata entry {OWN_METADATA!r} that cannot be read")


def _is_floating(dtype: np.dtype[Any]) -> bool:
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True
