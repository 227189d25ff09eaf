"""Integer weights to folders of compressed-tensors; our masks beside them."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune._printing import some
from jaxprune._tree._axes import conventional
from jaxprune._tree._given import described
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune._tree._prunable import is_kernel
from jaxprune.export._compressed._integers import WEIGHT, read_integers
from jaxprune.export._compressed._schemes import Scheme, to_config
from jaxprune.oneshot import Codes, Quantized
from jaxprune.storage import _atomic, _quantize, _writer
from jaxprune.storage._tensors import OWN_METADATA
from jaxprune.storage._trees import Saved, TensorRow, as_numpy, version

# What takes every *.safetensors of a folder for the model's must not find the masks.
MASKS, MODEL, CONFIG = "masks.jaxprune", "model.safetensors", "config.json"


def write_compressed_tensors(
    folder: str | os.PathLike[str],
    found: Quantized,
    *,
    names: Callable[[str], str] | None = None,
    round_inputs: bool = False,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Saved:
    """Write integer weights as compressed-tensors does, and their masks beside them.

    ``model.safetensors`` holds the codes of each leaf that has some, packed into words of 32 bits (``pack-quantized``), its scales,
    and its codes of zero where they are not all 0; other leaves are plain. ``config.json`` says which modules have integers
    of how many bits. Kernels are stored as PyTorch keeps them, ``(out, in, ...)``, where their names tell which axis is which.
    A pruned weight is there the code of zero. ``masks.jaxprune``, which other programs leave alone, says which ones are pruned, and
    by which paths we know the tensors.

    Args:
        folder: for the three files; it is made if it is not there.
        found: what `oneshot.gptq` or `oneshot.prune_and_quantize` returned. Codes are of leaves with two axes, with as many scales
            along the one of the inputs as divide it. Scales are stored in the dtype of the leaf.
        names: from our path to the tensor's name in the file, which for a leaf with codes is ``<module>.weight``. None puts
            dots for slashes, and ``weight`` for a last ``kernel``.
        round_inputs: whether who runs the model is to round inputs as well, to 8 bits, each token by a scale of its own. Codes
            are then not packed, a byte each (``int-quantized``; W8A8 where codes have 8 bits).
        config: what else ``config.json`` is to hold.
        force: whether to replace files that are there already.

    Returns:
        A `Saved`, with a row for each leaf.

    Raises:
        ValueError: codes cannot be expressed so, are of no leaf, or keep what masks prune; a name is none of a module's
            weight. The message names the leaf.
        TypeError: `found` is no `Quantized`, or a leaf is no array.
        FileExistsError: the folder holds something already, and `force` is False; or tensors of another model, which readers
            would take for this one's.

    >>> import jax.numpy as jnp, tempfile
    >>> from jaxprune import export
    >>> codes = Codes(jnp.array([[-3], [1]], jnp.int8), jnp.array([[0.5]]), jnp.zeros((1, 1), jnp.int8), 4)
    >>> found = Quantized({"up": {"kernel": codes.values()}}, {"up": {"kernel": codes.codes != 0}}, {"up/kernel": codes})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export.write_compressed_tensors(folder + "/model", found)
    ...     again = export.read_compressed_tensors(folder + "/model")
    >>> again.params["up"]["kernel"].ravel().tolist(), again.codes["up/kernel"].bits
    ([-1.5, 0.5], 4)
    """
    if not isinstance(found, Quantized):
        raise TypeError(f"write_compressed_tensors(folder, found) takes an oneshot.Quantized; got {described(found)}.")
    folder = Path(folder)
    _atomic.require_new(folder, force)
    _require_alone(folder)
    named = _like_torch if names is None else names
    flat = flatten(found.params, "params")
    flat.require_arrays()
    masks = [None] * len(flat.paths) if found.masks is None else align_masks(found.masks, flat)
    for path, held in found.codes.items():
        if path not in flat.by_path or not isinstance(held, Codes):
            raise ValueError(f"codes has for {path!r} {described(held)}, which is no leaf's; codes are by path.")
    written: dict[str, _Leaf] = {}
    bits, rows = [], []
    for path, title, leaf, given in zip(flat.paths, flat.names, flat.leaves, masks, strict=True):
        values, mask = as_numpy(title, path or WEIGHT, leaf, given)
        if mask is not None and not mask.all():
            values = np.where(mask, values, np.zeros_like(values))
            bits.append(_writer.ready({named(path): np.packbits(mask.reshape(-1), bitorder="little")}))
        codes = found.codes.get(path)
        if codes is None:
            stored = _plain(path, named(path), values)
        else:
            stored = _rounded(named(path), codes, mask, values, title, round_inputs)
        written[path] = stored
        rows.append(
            TensorRow(
                path=path,
                shape=values.shape,
                dtype=str(values.dtype),
                bits=8 * values.dtype.itemsize if codes is None else codes.bits,
                size=values.size,
                kept=values.size if mask is None else int(np.count_nonzero(mask)),
                dense_bytes=values.nbytes,
                stored_bytes=sum(array.nbytes for array in stored.tensors.values()),
                largest_error=stored.errors[0],
                relative_error=stored.errors[1],
            )
        )
    schemes = {
        leaf.name.removesuffix("." + WEIGHT): leaf.scheme for leaf in written.values() if leaf.scheme is not None
    }
    if not schemes:
        raise ValueError(
            "No leaf of params has codes; jaxprune.save_sparse(path, params, masks) stores them as they are."
        )
    folder.mkdir(parents=True, exist_ok=True)
    leaves, moved = (
        {leaf.name: path for path, leaf in written.items()},
        [leaf.name for leaf in written.values() if leaf.moved],
    )
    record = json.dumps({"version": version(), "leaves": leaves, "moved": moved})
    chunks = [_writer.ready(leaf.tensors) for leaf in written.values()]
    size = _writer.write(folder / MODEL, chunks, {"format": "pt"}, compress=False)
    size += _writer.write(folder / MASKS, bits, {OWN_METADATA: record}, compress=False)
    text = json.dumps({**(config or {}), "quantization_config": to_config(schemes, round_inputs)}, indent=2)
    with _atomic.replacing(folder / CONFIG) as file:
        size += file.write(text.encode())
    return Saved(folder, size, sum(row.dense_bytes for row in rows), tuple(rows))


class _Leaf(NamedTuple):
    """What one leaf becomes in a file.

    Attributes:
        name: the model's name for it.
        tensors: by their names.
        moved: whether its axes are in PyTorch's order, and not as we have them.
        scheme: what its codes are, if it has some.
        errors: the largest one of the codes, and the relative one.
    """

    name: str
    tensors: dict[str, np.ndarray]
    moved: bool
    scheme: Scheme | None = None
    errors: tuple[float, float] = (0.0, 0.0)


def _plain(path: str, name: str, values: np.ndarray) -> _Leaf:
    order = _to_torch(path, values.shape)
    return _Leaf(name, {name: values if order is None else np.transpose(values, order)}, order is not None)


def _rounded(
    name: str, codes: Codes, mask: np.ndarray | None, values: np.ndarray, title: str, round_inputs: bool
) -> _Leaf:
    integers, module = read_integers(codes, mask, values, title), _module_of(name, title)
    turned = integers.transposed() if integers.inputs_first else integers
    errors = _quantize.errors(values, _quantize.dequantize(integers.codes, integers.scale, integers.zero))
    return _Leaf(name, turned.tensors(module, round_inputs), integers.inputs_first, integers.scheme, errors)


def _require_alone(folder: Path) -> None:
    others = [path.name for path in sorted(folder.glob("*.safetensors*")) if path.name != MODEL]
    if others:
        raise FileExistsError(f"{folder} holds {some(others)} beside {MODEL}, which readers take for the same model.")


def _like_torch(path: str) -> str:
    *modules, last = path.split("/")
    return ".".join([*modules, WEIGHT if last in ("kernel", "") else last])


def _module_of(name: str, title: str) -> str:
    """The name of a module and a dot, of its weight's name."""
    if not name.endswith("." + WEIGHT):
        raise ValueError(
            f"{title} has codes, and {name!r} is not the name of a module's weight, '<module>.weight'. Give names= a function of "
            "the path that returns such a one."
        )
    return name.removesuffix(WEIGHT)


def _to_torch(path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order of axes in which PyTorch keeps a kernel; None where that is its own, or not known."""
    if not is_kernel(path, np.broadcast_to(0, shape)):
        return None
    axes = conventional(path, shape)
    last = axes.inputs is not None and (axes.inputs % len(shape), axes.outputs) == (len(shape) - 2, (len(shape) - 1,))
    return torch_order(len(shape)) if last else None


def torch_order(ndim: int) -> tuple[int, ...]:
    """The order of axes that makes ``(out, in, ...)`` of ``(..., in, out)``."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))
