"""Integer weights from folders of compressed-tensors, with the masks that we keep beside ours."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._tree._paths import flatten
from jaxprune.export._compressed._integers import SCALE, WEIGHT, take_integers
from jaxprune.export._compressed._schemes import METHOD, scheme_of
from jaxprune.export._compressed._write import CONFIG, MASKS, MODEL, torch_order
from jaxprune.oneshot import Codes, Quantized
from jaxprune.storage import _quantize
from jaxprune.storage._checkpoint import Checkpoint
from jaxprune.storage._container import LONGEST_HEADER, StorageError, TensorFile
from jaxprune.storage._tensors import OWN_METADATA
from jaxprune.storage._trees import check_like, check_nesting, nest, to_arrays


def read_compressed_tensors(folder: str | os.PathLike[str], *, like: Any = None) -> Quantized:
    """Read a folder of integer weights, one of ours or any other of compressed-tensors.

    Formats: ``pack-quantized`` and ``int-quantized`` with one scale for each output or for each group of its inputs, in one file
    or in shards. Nothing in the folder is executed.

    Args:
        folder: with ``config.json`` and safetensors.
        like: a tree with the same paths, as in `load_sparse`; None makes nested dicts. What `write_compressed_tensors` wrote
            has the paths of its parameters. In other folders a weight of integers is the ``kernel`` of its module, ``[inputs,
            outputs]``; other tensors stay as they are, with slashes for the dots of their names.

    Returns:
        The parameters that the codes stand for, in the dtype of the scales, with masks and codes. Without ``masks.jaxprune`` all
        is kept: which zeros were pruned is not known.

    Raises:
        StorageError: a file is damaged, or holds weights of another format; a subclass of ValueError.
        ValueError: the folder does not fit `like`.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    with Checkpoint(folder) as checkpoint:
        tensors = {name: stored.load()[0] for name, stored in checkpoint.tensors.items()}
        file = next(iter(checkpoint.files.values()))
    record, bits = _read_masks(folder / MASKS)
    leaves: dict[str, str] = record.get("leaves", {})
    moved = set(record.get("moved", ()))
    found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    codes: dict[str, Codes] = {}
    for module in [name.removesuffix(SCALE) for name in tensors if name.endswith("." + SCALE)]:
        name = module + WEIGHT
        try:
            scheme = scheme_of(module[:-1], config)
        except ValueError as error:
            file.fail(str(error), name)
        integers = take_integers(module, tensors, scheme, file)
        path = leaves.get(name, (module + "kernel").replace(".", "/"))
        if name in moved or name not in leaves:
            integers = integers.transposed()
        values = _quantize.dequantize(integers.codes, integers.scale, integers.zero)
        mask = _mask(bits, name, values.shape, folder)
        zero = np.zeros(integers.scale.shape, np.int8) if integers.zero is None else integers.zero
        if mask is not None and (integers.codes != _quantize.spread(zero, values.shape))[~mask].any():
            raise StorageError(
                f"{folder / MASKS} prunes weights of {name!r} that {MODEL} keeps; it is of another model."
            )
        scale = integers.scale.astype(np.float32)
        codes[path] = Codes(
            jax.device_put(integers.codes), jax.device_put(scale), jax.device_put(zero), integers.scheme.bits
        )
        found[path] = values, mask
    for name, tensor in tensors.items():
        path = leaves.get(name, name.replace(".", "/"))
        order = np.argsort(torch_order(tensor.ndim)) if name in moved and tensor.ndim > 1 else range(tensor.ndim)
        values = np.transpose(tensor, order).copy()
        found[path] = values, _mask(bits, name, values.shape, folder)
    return _build(found, codes, like, folder, file)


def _read_config(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > LONGEST_HEADER:
        raise StorageError(f"{path} is longer than {LONGEST_HEADER:,} bytes.")
    try:
        config = json.loads(path.read_bytes())["quantization_config"]
        groups = config["config_groups"].values()
        if config["quant_method"] == METHOD and all(isinstance(group["targets"], list) for group in groups):
            return config
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise StorageError(f"{path} has no quantization_config of {METHOD}.")


def _read_masks(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Our record of a folder, and the bits of each mask, if there are any."""
    if not path.exists():
        return {}, {}
    with TensorFile(path) as file:
        try:
            record = json.loads(file.metadata[OWN_METADATA])
            record = {
                "leaves": {str(n): str(p) for n, p in record["leaves"].items()},
                "moved": list(map(str, record["moved"])),
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            file.fail(f"has no metadata entry {OWN_METADATA!r} that can be read")
        for name in record["leaves"].values():
            file.check_name(name)
        return record, {name: file.read(name) for name in file.entries}


def _mask(bits: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray | None:
    if name not in bits:
        return None
    count = int(np.prod(shape))
    if bits[name].dtype != np.uint8 or bits[name].shape != (-(-count // 8),):
        raise StorageError(f"{folder / MASKS} has for {name!r} a mask of another shape than {shape}.")
    return np.unpackbits(bits[name], count=count, bitorder="little").reshape(shape).astype(bool)


def _build(
    found: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    codes: dict[str, Codes],
    like: Any,
    folder: Path,
    file: TensorFile,
) -> Quantized:
    if like is None:
        check_nesting(file, list(found))
        pairs = {path: to_arrays(*pair) for path, pair in found.items()}
        params, masks = ({path: pair[i] for path, pair in pairs.items()} for i in (0, 1))
        return Quantized(nest(params), nest(masks), codes)
    flat = flatten(like, "like")
    check_like(folder, {path: (values.shape, values.dtype) for path, (values, _) in found.items()}, flat)
    arrays = [to_arrays(*found[path], leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)]
    return Quantized(flat.build([a for a, _ in arrays]), flat.build([m for _, m in arrays]), codes)
