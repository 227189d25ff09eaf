"""Prune a deep model block by block, with the weights of one block and the activations between two in memory."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxprune._jaxpr import _equations
from jaxprune._tree._leaves import own, require_real
from jaxprune._tree._masks import all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._codes import Codes
from jaxprune.oneshot._method import Found, Method, call, together
from jaxprune.oneshot._sequential import aim, require_target
from jaxprune.oneshot._stream import Stream
from jaxprune.sites._accumulate import cross_products, grams
from jaxprune.sites._calibrate import Grams, inputs_of, require_alike, require_finite, warn_of_unresolved
from jaxprune.sites._contractions import Contraction
from jaxprune.sites._find import Reading, read
from jaxprune.sites._matrices import sites_of
from jaxprune.sites._sites import Sites


def block_by_block(
    fn: Callable[..., Any],
    blocks: Iterable[Any],
    batches: Iterable[Any],
    method: Method[Found],
    *,
    target: Literal["dense", "current"] = "dense",
    prunable: Prunable = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[Found]:
    """Prune block after block of a deep model, and yield each with its masks as soon as it is finished.

    What `sequential` does, for a model that is one function again and again: every parameter is calibrated on what the
    pruned ones before it give, in this block and in all earlier ones. At any time memory holds

    - one block, as it was and as it becomes, and its masks;
    - the Gram matrix of one input (with ``target="dense"`` a second of its size), never those of a whole model;
    - the activations between two blocks for all batches (with ``target="dense"`` also those of the dense model), or,
      where they lie in a `folder`, those of one batch;
    - what `fn` needs for one batch.

    In exchange a block is evaluated once for each of its inputs that weights multiply (four times in a transformer: those
    of query, key and value, of the output, of the first and of the last layer of the perceptron), and once more for what
    follows; compiled once for all blocks of one shape. Blocks are asked for one at a time: they may be slices of stacked
    layers, or be read from disk, as `storage.prune_blocks` does. Not for use under jit.

    Args:
        fn: ``fn(params, hidden, *constants)``, one block: returns activations as `hidden` is, of the same shapes and dtypes.
        blocks: the parameters of the blocks in order, each a pytree of arrays, such as ``[params["0"], params["1"]]`` or
            ``(jax.tree.map(lambda leaf: leaf[i], stack) for i in range(12))``.
        batches: what enters the first block: an iterable of `hidden` of equal shapes, or of tuples ``(hidden, *constants)``.
            The activations stay in the dtype that they have: give bfloat16, and a block that returns it, to halve them.
        method: as in `sequential`; ``functools.partial(jaxprune.oneshot.sparsegpt, k=0.5)``. A tree prefix k is one of a
            block, the same for all.
        target: as in `sequential`. What stands within a loop of the block imitates its own outputs, as with "current".
        prunable: which leaves of a block are pruned, as in `make_masks`; None prunes all that multiply data.
        folder: where to keep activations on disk, in files that are gone at the end; None keeps them as arrays.

    Yields:
        The pruned parameters and the masks of each block, of its treedef, True = keep; a `Quantized` where the method returns one.

    Raises:
        ValueError: target is neither of both; and when the first block is asked for: there is no batch, a batch has another
            shape than the first, a block returns something else than it was given, a leaf to prune multiplies no data in a way
            that is understood, activations are not finite; and whatever the method raises. A note names the block.
        TypeError: a leaf to prune is complex.

    Warns:
        CalibrationWarning: parameters are used in ways that are not understood; these stay dense.

    >>> import functools, jax.numpy as jnp, jaxprune
    >>> blocks = [{"kernel": jnp.array([[1.0, 0.1], [0.2, 1.0]])}] * 2
    >>> data = [jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])]
    >>> method = functools.partial(jaxprune.oneshot.sparsegpt, k=0.5)
    >>> for pruned, masks in block_by_block(lambda params, x: x @ params["kernel"], blocks, data, method):
    ...     print(masks["kernel"].tolist())
    [[True, False], [False, True]]
    [[True, False], [False, True]]

    Reference: Frantar, Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023,
    section 4 (one block after the other; its parts are pruned in sequence, each measured behind those before it, as the
    authors' code does for Llama with ``--true-sequential``); the target as in `sequential`.
    """
    require_target(target, "block_by_block")
    return _walk(fn, blocks, batches, method, target == "dense", prunable, folder)


def _walk(
    fn: Callable[..., Any],
    blocks: Iterable[Any],
    batches: Iterable[Any],
    method: Method[Found],
    imitate_dense: bool,
    prunable: Prunable,
    folder: str | os.PathLike[str] | None,
) -> Iterator[Found]:
    with contextlib.ExitStack() as stack:
        here = None
        if folder is not None:
            here = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="activations-", dir=folder)))
        data = _Data(Stream(here, "current"), [])
        for number, batch in enumerate(batches):
            data.append(inputs_of(batch))
            require_alike(inputs_of(batch), data.inputs(0), number)
            del batch
        if not data.constants:
            raise ValueError("There is no calibration batch; an iterator that was read before is empty.")
        dense = data
        step = jax.jit(fn)
        plans: dict[Any, _Plan] = {}
        for number, given in enumerate(blocks):
            try:
                params = jax.tree.map(jnp.asarray, given)
                key = jax.tree.structure(params), tuple(map(jax.typeof, jax.tree.leaves(params)))
                if key not in plans:
                    plans[key] = _plan(fn, params, data.inputs(0), prunable)
                leaves, masks, codes = _prune(plans[key], params, data, dense, method, imitate_dense)
                pruned = jax.tree.unflatten(key[0], leaves)
                if imitate_dense:
                    after = _Data(Stream(here, "dense"), dense.constants) if dense is data else dense
                    dense.advance(functools.partial(step, params), after)
                    dense = after
                data.advance(functools.partial(step, pruned), data)
            except Exception as error:
                error.add_note(f"This is about block {number}.")
                raise
            finished: Found = together(pruned, jax.tree.unflatten(key[0], masks), codes)
            del given, params, leaves, masks, codes, pruned  # while it is stored, nothing of it is held here
            yield finished
            del finished


@dataclasses.dataclass
class _Data:
    """What enters a block: activations, which change from block to block, and constants, for each batch."""

    stream: Stream
    constants: list[tuple[Any, ...]]

    def append(self, inputs: tuple[Any, ...]) -> None:
        self.stream.put(len(self.constants), inputs[0])
        self.constants.append(inputs[1:])

    def inputs(self, batch: int) -> tuple[Any, ...]:
        return self.stream.get(batch), *self.constants[batch]

    def advance(self, step: Callable[..., Any], after: "_Data") -> None:
        for batch in range(len(self.constants)):
            after.stream.put(batch, step(*self.inputs(batch)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
    """Parameters that are pruned at one time, since they have the same inputs.

    Attributes:
        paths: of the parameters.
        contraction: how their one input is contracted; None where they have several, or stand in a loop.
        measure: (leaves, inputs, leaves of the dense model or None, its inputs) -> sums for one batch; to ask for their shapes.
        add: the same added to the sums so far, which are the first argument.
    """

    paths: list[str]
    contraction: Contraction | None
    measure: Callable[..., Any]
    add: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """How blocks of one shape are pruned: as they were read, and in which stages."""

    reading: Reading
    stages: list[_Stage]


def _plan(fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], prunable: Prunable) -> _Plan:
    reading = read(fn, params, inputs)
    _require_same(reading.results, inputs[0])
    warn_of_unresolved(reading.sites, stacklevel=3)
    flat = reading.flat
    chosen = read_params(params, prunable=prunable, sites=reading.sites).prunable
    stages: dict[frozenset[int], list[str]] = collections.defaultdict(list)
    pruned = dict(zip(flat.paths, chosen, strict=True))
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        if pruned[path]:
            require_real(leaf, name, "block_by_block")
            sites_of(Grams(reading.sites, {}, {}), path, "block_by_block")
    for path in dict.fromkeys(site.path for site in reading.sites if pruned[site.path]):  # in the order of the products
        stages[frozenset(group for site in reading.sites.at(path) for group in site.groups)].append(path)
    # Shapes are enough from here on: the weights are those of one block, the plan serves all.
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat.leaves]
    reading = dataclasses.replace(reading, flat=dataclasses.replace(flat, leaves=shapes))
    return _Plan(reading, [_stage(reading, groups, paths) for groups, paths in stages.items()])


def _require_same(results: Any, hidden: Any) -> None:
    def shown(leaves: Iterable[Any]) -> str:
        return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"

    (found, structure), (leaves, wanted) = jax.tree.flatten(results), jax.tree.flatten(hidden)
    given = shown(map(jax.typeof, leaves))
    if shown(found) != given or str(structure) != str(wanted):
        raise ValueError(
            f"block_by_block hands what a block returns to the next, but fn returns {shown(found)} where hidden is {given}. "
            "Let fn return the activations alone, as it is given them."
        )


def _stage(reading: Reading, groups: frozenset[int], paths: list[str]) -> _Stage:
    contraction = _plain(reading, groups)

    def sums(leaves: Any, inputs: Any) -> Any:
        _, found = reading.run(leaves, jax.tree.leaves(inputs), grams, set(groups))
        return {group: (_flat(gram, 2), _flat(counts, 0)) for group, (gram, counts) in found.items()}, None

    def data(leaves: Any, inputs: Any) -> Any:
        found = reading.run(leaves, jax.tree.leaves(inputs), lambda _, operands: operands[0], set(groups))[1]
        return found[min(groups)]

    def measure(leaves: Any, inputs: Any, dense: Any, dense_inputs: Any) -> Any:
        if dense is None:
            return sums(leaves, inputs)
        assert contraction is not None
        pruned, wanted = data(leaves, inputs), data(dense, dense_inputs)
        return {min(groups): grams(contraction, (pruned,))}, cross_products(contraction, pruned, wanted)

    @functools.partial(jax.jit, donate_argnums=0)
    def add(totals: Any, *arguments: Any) -> Any:
        return jax.tree.map(jnp.add, totals, measure(*arguments))

    return _Stage(paths, contraction, measure, add)


def _plain(reading: Reading, groups: frozenset[int]) -> Contraction | None:
    """How the one input of a stage is contracted; None where there are several, or where a loop lies around it."""
    places = [first for first, group in reading.groups.items() if group in groups]
    uses = [(place, use) for (place, _), (site, use) in reading.uses.items() if groups.intersection(site.groups)]
    contractions = {use.contraction for _, use in uses}
    looped = any(_equations.enclosing(reading.body, place) for place, _ in uses)
    if len(places) > 1 or len(contractions) > 1 or looped:
        return None
    (contraction,) = contractions
    return contraction if contraction.kind in ("dot", "conv") else None


def _flat(array: jax.Array, kept: int) -> jax.Array:
    cut = array.ndim - kept
    return array.reshape(math.prod(array.shape[:cut]), *array.shape[cut:])


def _prune(
    plan: _Plan, params: Any, data: _Data, dense: _Data, method: Method[Any], imitate_dense: bool
) -> tuple[list[Any], list[jax.Array], dict[str, Codes]]:
    """Prune one block, stage by stage; return its leaves, their masks, and the codes of those that were rounded."""
    flat = read_arrays(params, "params")
    leaves, masks = list(flat.leaves), [all_true(leaf) for leaf in flat.leaves]
    codes: dict[str, Codes] = {}
    for stage in plan.stages:
        moved = dense is not data or any(new is not old for new, old in zip(leaves, flat.leaves, strict=True))
        both = imitate_dense and moved and stage.contraction is not None
        totals = None
        for batch in range(len(data.constants)):
            others = (flat.leaves, dense.inputs(batch)) if both else (None, None)
            arguments = leaves, data.inputs(batch), *others
            if totals is None:  # zeros, so that one program serves all batches
                totals = jax.tree.map(_zeros, jax.eval_shape(stage.measure, *arguments))
            # Without waiting, batches would be read ahead of the work.
            totals = jax.block_until_ready(stage.add(totals, *arguments))
        assert totals is not None
        sums, cross = totals
        found = Grams(
            _of(plan.reading.sites, stage.paths),
            {g: gram for g, (gram, _) in sums.items()},
            {g: n for g, (_, n) in sums.items()},
        )
        require_finite(found)
        for path in stage.paths:
            place = flat.paths.index(path)
            only = dataclasses.replace(found, sites=_of(found.sites, [path]))
            leaf = leaves[place]
            for site in only.sites if cross is not None else ():
                leaf = aim(site, leaf, only.of(site), cross)
            leaves[place], masks[place], found_codes = call(method, flat, path, leaf, only)
            codes |= {} if found_codes is None else {path: found_codes}
    return [own(new) if new is old else new for new, old in zip(leaves, flat.leaves, strict=True)], masks, codes


def _zeros(shape: Any) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)


def _of(sites: Sites, paths: list[str]) -> Sites:
    return sites.select(lambda site: site.path in paths)
