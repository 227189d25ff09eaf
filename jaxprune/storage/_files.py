"""Prune and convert models on disk, one tensor in memory at a time."""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxprune import rules
from jaxprune._masks import make_masks
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune._tree._names import slashed
from jaxprune._tree._patterns import matches
from jaxprune._tree._prunable import Predicate, is_kernel
from jaxprune.rules._guard import check_max_sparsity
from jaxprune.rules._rule import AnyRule, Rule, as_rule
from jaxprune.storage import _ranking
from jaxprune.storage._checkpoint import Checkpoint, Encode, Writing, plan
from jaxprune.storage._coding import Coding, read_coding
from jaxprune.storage._tensors import Encoded, Stored
from jaxprune.storage._trees import Saved, check_metadata

# (tensor, its values) -> its mask, or None to keep it whole.
MaskOf = Callable[[Stored, np.ndarray], np.ndarray | None]
Done = Callable[[str], None]


def prune_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    k: float,
    *,
    rule: AnyRule = rules.std_threshold,
    prunable: Predicate | str | Sequence[str] | None = None,
    dense: bool = False,
    quantize: int | None = None,
    quantize_tables: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    compress: bool = False,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    done: Done = lambda name: None,
) -> Saved:
    """Prune a model on disk by the magnitude of its weights, without its class and without loading it whole.

    What is pruned already stays pruned. The rule is applied to each tensor by itself; `rules.global_sparsity` and
    `rules.erk_sparsity` rank or allocate over all of them, with the same result as `make_masks` on the whole model. Of a
    function of your own it cannot be known whether it looks at several layers: it is given one tensor at a time.

    Args:
        source: a safetensors file, plain or written by `save_sparse`, or a folder of shards with their index.
        target: the file or folder to write, not the source itself. Each file appears whole or not at all.
        k: the rule's strength, one number.
        rule: ``(scores, k) -> masks``, as in `make_masks`.
        prunable: ``(path, leaf) -> bool``, or glob patterns of paths or of modules above the tensor; the path has slashes
            for the dots of a name, the leaf a shape and a dtype. None prunes what `is_kernel` names.
        dense: whether to write zeros for pruned weights, a plain file that anything reads.
        quantize: as in `save_sparse`, with `dense=False`. What the source holds as integers stays what it is, unless `quantize`,
            `quantize_tables` or `dtype` ask for something.
        quantize_tables: as in `save_sparse`, with `dense=False`.
        group_size: as in `save_sparse`.
        dtype: as in `save_sparse`; masks are made before values are rounded.
        compress: as in `save_sparse`.
        metadata: strings for the header, beside those of the source.
        force: as in `save_sparse`; the source itself is never replaced.
        done: called with the name of each tensor after each of the two times it has been encoded.

    Returns:
        A `Saved`, as from `save_sparse`.

    Raises:
        StorageError: the source is damaged, or changed while it was read.
        ValueError: nothing is prunable, k does not fit the rule, or the target is the source, a device or a pipe.
        FileExistsError: the target is there already, and `force` is False.
    """
    with Checkpoint(source) as checkpoint:
        checkpoint.check_target(Path(target), force)
        names = choose_tensors(checkpoint, prunable)
        planned = plan_file(
            checkpoint,
            masks_by(rule, k, checkpoint, names),
            dense=dense,
            quantize=quantize,
            quantize_tables=quantize_tables,
            group_size=group_size,
            dtype=dtype,
            compress=compress,
            metadata=metadata,
            done=done,
        )
        return planned.write(Path(target))


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dense: bool = False,
    quantize: int | None = None,
    quantize_tables: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    compress: bool = False,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    done: Done = lambda name: None,
) -> Saved:
    """Write a model on disk anew: sparse from plain, plain from sparse, quantised, compressed; one tensor at a time.

    Masks that are stored are kept. In a plain tensor that is a kernel (see `is_kernel`) the zeros count as pruned; they are
    stored under a bitmask if there are so many that it pays.

    Args:
        source: as in `prune_file`.
        target: as in `prune_file`.
        dense: as in `prune_file`.
        quantize: as in `prune_file`.
        quantize_tables: as in `prune_file`.
        group_size: as in `prune_file`.
        dtype: as in `prune_file`.
        compress: as in `prune_file`.
        metadata: as in `prune_file`.
        force: as in `prune_file`.
        done: as in `prune_file`.

    Returns:
        A `Saved`.

    Raises:
        StorageError: the source is damaged, or changed while it was read.
        ValueError: a tensor to quantise holds NaN or infinity, or the target is the source, a device or a pipe.
        FileExistsError: the target is there already, and `force` is False.
    """
    with Checkpoint(source) as checkpoint:
        checkpoint.check_target(Path(target), force)
        planned = plan_file(
            checkpoint,
            stored_or_paying,
            dense=dense,
            quantize=quantize,
            quantize_tables=quantize_tables,
            group_size=group_size,
            dtype=dtype,
            compress=compress,
            metadata=metadata,
            done=done,
        )
        return planned.write(Path(target))


def choose_tensors(checkpoint: Checkpoint, prunable: Predicate | str | Sequence[str] | None) -> list[str]:
    """Return the names of the tensors to prune; raise a ValueError when there is none."""
    fits = _predicate(prunable, list(checkpoint.tensors))
    chosen = [
        name
        for name, tensor in checkpoint.tensors.items()
        if tensor.count and is_floating(tensor) and fits(slashed(name), jax.ShapeDtypeStruct(tensor.shape, np.float32))
    ]
    if not chosen:
        names = ", ".join(list(checkpoint.tensors)[:4]) or "none"
        raise ValueError(f"{checkpoint.path}: no tensor is prunable. Found {names}; say which ones are.")
    return chosen


def _predicate(prunable: Predicate | str | Sequence[str] | None, names: list[str]) -> Predicate:
    if prunable is None:
        return is_kernel
    if callable(prunable):
        return prunable
    patterns = [prunable] if isinstance(prunable, str) else list(prunable)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"prunable={pattern!r} matches no tensor; they are named like {names[0] if names else None!r}."
            )
    return lambda path, leaf: any(matches(pattern, path) for pattern in patterns)


def masks_by(rule: AnyRule, k: float, checkpoint: Checkpoint, names: list[str]) -> MaskOf:
    """Return the function that masks one tensor of a model; rules over all tensors read them all beforehand."""
    chosen, found = frozenset(names), as_rule(rule)
    if found.scope == "model":
        of_one = _over_all(found, k, checkpoint, names)
    else:
        of_one = functools.partial(_mask_of_one, rule, k)
    return lambda tensor, values: of_one(tensor.name, values) if tensor.name in chosen else None


def _over_all(
    rule: Rule, k: float, checkpoint: Checkpoint, names: list[str]
) -> Callable[[str, np.ndarray], np.ndarray]:
    """Rank or allocate over all tensors, as a rule does that looks at the whole model."""
    if rule.grain != "weight":
        raise ValueError(
            f"{rule.name} looks at all tensors at once, which prune_file does only for single weights: take "
            "rules.global_sparsity or rules.erk_sparsity, or a rule that looks at one layer."
        )
    if not rule.low <= k <= rule.high:
        raise ValueError(f"{rule.name} takes {rule.allowed}; got k = {k:g}.")
    check_max_sparsity(rule.max_sparsity, rule.name)
    if rule.shares == "threshold":
        read = lambda name: checkpoint.tensors[name].load()[0]  # noqa: E731
        return _ranking.GlobalRanking(names, read, k, rule.max_sparsity).mask
    removed = _ranking.erk_removed({name: checkpoint.tensors[name].shape for name in names}, k, rule.max_sparsity)

    def of_one(name: str, values: np.ndarray) -> np.ndarray:
        return _mask_of_one(rules.layer_sparsity, removed[name] / values.size, name, values)

    return of_one


def nonzero(tensor: Stored, values: np.ndarray) -> np.ndarray | None:
    """What a plain tensor says of its mask: the zeros of a kernel count as pruned."""
    if not (is_floating(values) and is_kernel(tensor.name, values)):
        return None
    return values != 0


def _mask_of_one(rule: AnyRule, k: float, name: str, values: np.ndarray) -> np.ndarray:
    # Rules rank no 8-bit floats, nor more than 32 bits unless JAX is told to.
    wide = (
        values if values.dtype.itemsize in (2, 4) else values.astype(np.complex64 if is_complex(values) else np.float32)
    )
    return np.asarray(make_masks({name: jax.device_put(wide)}, k, rule=rule, prunable={name: True})[name])


def counts(tensor: Stored) -> bool:
    """Whether a tensor's weights count as prunable: it is a kernel by its name, or lies under a mask."""
    if "bitmask" in tensor.members:
        return True
    return tensor.count > 0 and is_floating(tensor) and is_kernel(tensor.name, tensor)


def stored_or_paying(tensor: Stored, values: np.ndarray) -> np.ndarray | None:
    """Mask a plain kernel by its zeros, where there are so many that the bitmask pays."""
    mask = None if tensor.encoded else nonzero(tensor, values)
    if mask is None:
        return None
    rows = mask.size // mask.shape[-1] if mask.size else 0
    costs = rows * (-(-mask.shape[-1] // 8) + 8)
    return mask if (mask.size - np.count_nonzero(mask)) * values.itemsize > costs else None


def plan_file(
    checkpoint: Checkpoint,
    mask_of: MaskOf,
    *,
    dense: bool = False,
    quantize: int | None = None,
    quantize_tables: int | None = None,
    group_size: int | None = None,
    dtype: str | None = None,
    compress: bool = False,
    metadata: Mapping[str, str] | None = None,
    done: Done = lambda name: None,
) -> Writing:
    """Plan what `prune_file` and `convert_file` write; arguments as there."""
    coding = read_coding(quantize, quantize_tables, group_size, dtype, compress=compress)
    if dense and (quantize or quantize_tables):
        raise ValueError("quantize= and quantize_tables= store integers, which dense=True does not; give one of them.")
    coding.check_tables(checkpoint.tensors.items(), str(checkpoint.path))
    encode_one: Encode = functools.partial(encode_tensor, mask_of, dense, coding)
    strings = checkpoint.metadata | check_metadata(metadata)
    return plan(checkpoint, encode_one, metadata=strings, compress=compress, done=done)


def encode_tensor(mask_of: MaskOf, dense: bool, coding: Coding, tensor: Stored) -> Encoded:
    """Encode a tensor under the mask that it has and the one that it is to get."""
    values, before = tensor.load()
    mask = mask_of(tensor, values)
    if before is not None:
        mask = before if mask is None else before & mask
    # Whether or not its mask is stored, the zeros of a kernel count as pruned, as in `summarize_file`.
    known = nonzero(tensor, values) if mask is None else mask
    kept = math.prod(values.shape) if known is None else int(np.count_nonzero(known))
    codes = None if dense or coding.changes_codes else tensor.codes(mask)
    if dense and mask is not None:
        values, mask = np.where(mask, values, np.zeros_like(values)), None
    return coding.encode(tensor.name, values, mask, codes=codes)._replace(kept=kept)
