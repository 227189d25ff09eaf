"""Prune a model on disk with calibration data, the weights of one block in memory at a time."""

import contextlib
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxprune._tree._paths import Tree, flatten
from jaxprune.oneshot import Codes
from jaxprune.storage._checkpoint import Checkpoint, plan
from jaxprune.storage._coding import read_coding
from jaxprune.storage._files import encode_tensor
from jaxprune.storage._tensors import Encoded, Stored
from jaxprune.storage._trees import Saved, check_metadata, save_sparse

NUMBER = "{}"

# The blocks' parameters, one after the other -> for each block its pruned parameters and its masks, or a `Quantized`.
Prune = Callable[[Iterator[Any]], Iterable[tuple[Any, ...]]]


def prune_blocks(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    names: Any,
    prune: Prune,
    *,
    dense: bool = False,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    done: Callable[[int], None] = lambda block: None,
) -> Saved:
    """Prune the blocks of a model on disk by `oneshot.block_by_block`, however much larger than memory the model is.

    Blocks are read when they are asked for and written as soon as they are pruned, first to a temporary folder beside the
    target, which takes as much of the disk as the pruned blocks do. When all are there, the model is written anew, one tensor
    at a time: the same shards with the same names, shapes and dtypes; what belongs to no block as it was. What is pruned
    already stays pruned. Until then there is no target, and the source is only read. A run that was stopped begins anew.

    Kernels may lie as ``[outputs, inputs]``, as PyTorch has them: the function of a block says what it multiplies.

    Args:
        source: as in `prune_file`.
        target: as in `prune_file`.
        names: the parameters of a block, a pytree as its function takes them, with the name of a tensor for each leaf, in
            which ``{}`` stands for the number of the block: ``{"query": "model.layers.{}.self_attn.q_proj.weight"}``.
            Blocks are numbered from 0 and end where there is no more tensor.
        prune: takes an iterator of the blocks' parameters and returns an iterable of their pruned parameters and masks, or of a
            `Quantized` for each: ``lambda blocks: oneshot.block_by_block(fn, blocks, batches, method)``. Codes are stored as
            they are.
        dense: as in `prune_file`: zeros for pruned weights, in a plain file; otherwise the masks are stored.
        metadata: as in `prune_file`.
        force: as in `prune_file`.
        done: called with the number of each block when it is pruned and stored.

    Returns:
        A `Saved`, as from `save_sparse`.

    Raises:
        StorageError: the source is damaged, or changed while it was read.
        ValueError: a tensor of a block is missing, a name holds no ``{}``, `prune` returns too few blocks or leaves of another
            shape or dtype, or the target is the source, a device or a pipe; and whatever `prune` raises.
        FileExistsError: the target is there already, and `force` is False.

    >>> import functools, jax.numpy as jnp, jaxprune, tempfile
    >>> model = {"layers": [{"weight": jnp.array([[1.0, 0.2], [0.1, 1.0]])}] * 2, "embed": jnp.ones((3, 2))}
    >>> data, method = [jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])], functools.partial(jaxprune.oneshot.sparsegpt, k=0.5)
    >>> prune = lambda blocks: jaxprune.oneshot.block_by_block(lambda params, x: x @ params["w"].T, blocks, data, method)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = jaxprune.save_sparse(folder + "/model.safetensors", model)
    ...     pruned = prune_blocks(
    ...         folder + "/model.safetensors", folder + "/pruned.safetensors", {"w": "layers/{}/weight"}, prune
    ...     )
    >>> {row.path: (row.kept, row.size) for row in pruned.tensors}
    {'embed': (6, 6), 'layers/0/weight': (2, 4), 'layers/1/weight': (2, 4)}
    """
    target = Path(target)
    coding = read_coding(None, None, None, None, compress=False)
    with Checkpoint(source) as checkpoint:
        checkpoint.check_target(target, force)
        strings = checkpoint.metadata | check_metadata(metadata)
        blocks = _blocks(checkpoint, names)
        if checkpoint.path.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            parts = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)))
            results = iter(prune(map(functools.partial(_load, checkpoint), blocks)))
            stack.callback(getattr(results, "close", lambda: None))  # what a generator holds goes, whatever happens
            for number, block in enumerate(blocks):
                found = next(results, None)
                if found is None:
                    raise ValueError(f"prune returned {number} of {len(blocks)} blocks; let it return all, in order.")
                arrays, kept, codes = _checked(checkpoint, block, *found)
                save_sparse(parts / f"{number}.safetensors", arrays, kept, codes=codes)
                del found
                done(number)
            pruned = stack.enter_context(Checkpoint(parts))

            def encode(tensor: Stored) -> Encoded:
                return encode_tensor(lambda *_: None, dense, coding, pruned.tensors.get(tensor.name, tensor))

            return plan(checkpoint, encode, metadata=strings).write(target)


def _blocks(checkpoint: Checkpoint, names: Any) -> list[Tree]:
    """The names of the tensors of every block."""
    pattern = flatten(names, "names")
    for leaf, name in pattern.named():
        if not isinstance(name, str) or NUMBER not in name:
            raise ValueError(f"{leaf} is {name!r}, not the name of a tensor with {NUMBER} for the number of the block.")
    if len(set(pattern.leaves)) < len(pattern.leaves) or not pattern.leaves:
        raise ValueError("names is empty, or has a name twice; let each leaf name a tensor of its own.")
    blocks: list[Tree] = []
    for number in itertools.count():
        found = Tree(
            pattern.what,
            pattern.paths,
            pattern.names,
            [name.replace(NUMBER, str(number)) for name in pattern.leaves],
            pattern.treedef,
        )
        missing = [name for name in found.leaves if name not in checkpoint.tensors]
        if len(missing) == len(found.leaves):
            break
        if missing:
            raise ValueError(f"{checkpoint.path}: block {number} has no tensor {missing[0]!r}, which names asks for.")
        blocks.append(found)
    number = len(blocks)
    asked = pattern.leaves[0].replace(NUMBER, str(number))
    if not blocks:
        first = min(checkpoint.tensors, default=None)
        raise ValueError(
            f"{checkpoint.path}: there is no tensor {asked!r}, which names asks for; one is named {first!r}."
        )
    known = {name for block in blocks for name in block.leaves}
    numbered = re.compile("|".join(r"\d+".join(map(re.escape, name.split(NUMBER))) for name in pattern.leaves))
    later = min((name for name in checkpoint.tensors if name not in known and numbered.fullmatch(name)), default=None)
    if later is not None:
        raise ValueError(
            f"{checkpoint.path}: there is no tensor {asked!r} of block {number}, although there is {later!r}."
        )
    return blocks


def _load(checkpoint: Checkpoint, block: Tree) -> Any:
    return block.build([checkpoint.tensors[name].load()[0] for name in block.leaves])


def _checked(
    checkpoint: Checkpoint, block: Tree, params: Any, masks: Any, codes: Mapping[str, Codes] = MappingProxyType({})
) -> tuple[Any, Any, dict[str, Codes]]:
    """Return a pruned block's parameters, masks and codes by the names of the tensors, on the host."""
    arrays, kept = {}, {}
    names = dict(zip(block.paths, block.leaves, strict=True))
    leaves, fitting = (block.aligned(flatten(*named)) for named in ((params, "params"), (masks, "masks")))
    for name, leaf, mask in zip(block.leaves, leaves, fitting, strict=True):
        tensor, array = checkpoint.tensors[name], np.asarray(leaf)
        if (array.dtype, array.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(
                f"prune returned {array.dtype}{list(array.shape)} for tensor {name!r}, which is "
                f"{tensor.dtype}{list(tensor.shape)}. Let it keep shapes and dtypes (float64 needs jax_enable_x64)."
            )
        before = tensor.load()[1] if tensor.encoded else None
        arrays[name] = array
        kept[name] = np.asarray(mask) if before is None else np.asarray(mask) & before
    return arrays, kept, {names[path]: found for path, found in codes.items()}
