"""Prune layer by layer: each layer is calibrated on the outputs of the layers already pruned."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import own, require_real
from jaxprune._tree._masks import all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Prunable
from jaxprune._tree._sharding import through_compiler, without_explicit_axes
from jaxprune.oneshot._codes import Codes
from jaxprune.oneshot._method import Found, Method, call, stack, together
from jaxprune.sites._accumulate import cross_products, grams
from jaxprune.sites._calibrate import Grams, all_inputs, calibrate_grams
from jaxprune.sites._contractions import Contraction
from jaxprune.sites._factorise import factorise
from jaxprune.sites._find import Planned, Reading, read
from jaxprune.sites._lanes import Lanes, Lockstep, Weights
from jaxprune.sites._matrices import sites_of
from jaxprune.sites._sites import Site, Sites
from jaxprune.sites._views import Each

# How much is added to the diagonal of a Gram matrix, as a share of its mean, to find the weights to aim at.
_DAMPING = 0.01


# (path, index of the layer within the leaf, its weights, its mask) -> nothing.
OnLayer = Callable[[str, tuple[int, ...], jax.Array, jax.Array], None]


def sequential(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method[Found],
    *,
    target: Literal["dense", "current"] = "dense",
    prunable: Prunable = None,
    sites: Sites | None = None,
    on_layer: OnLayer = lambda path, index, weights, mask: None,
) -> Found:
    """Prune layer by layer, in the order in which the function uses them, each on what the pruned layers before give.

    Evaluates the function once for all batches in lockstep. Where data meets a prunable parameter, its Gram matrix is
    taken on the pruned model's activations X~, the method prunes it, and evaluation goes on with the pruned weights.
    With ``target="dense"`` the dense model is evaluated beside it, and the method is given not the weights W but those
    that come closest to the dense model's outputs X W on the pruned model's inputs X~,
    ``W* = (X~'X~ + d I)^-1 (X~'X + d I) W``, so that each layer also makes up for the errors of those before.

    The layers of a scan are pruned one after the other, and written into their stack in place. What is read more than once with other inputs (the weights
    of a recurrent cell, tied weights, whatever stands within while or cond) is pruned first, in one go, on the
    dense model's activations. Held are one Gram matrix at a time, the dense and the pruned parameters, and the activations of
    all batches that are still needed: between the blocks of a transformer its residual stream, within one everything of
    that moment, the scores of attention too. `block_by_block` holds less. Not for use under jit.

    Args:
        fn: ``fn(params, *inputs)``, as in `calibrate_grams`.
        params: a pytree of arrays.
        batches: an iterable of inputs of equal shapes, as in `calibrate_grams`; all are kept.
        method: ``(params, grams, prunable=...) -> (params, masks)``, for example
            ``functools.partial(jaxprune.oneshot.sparsegpt, k=0.5)``. It is called for one parameter, or one layer of a stack, at
            a time (then without the axis of layers): a tree prefix k reaches it whole, but k cannot differ within a stack.
            One that rounds, as ``functools.partial(jaxprune.oneshot.prune_and_quantize, k=0.5)``, returns a `Quantized`.
        target: what the pruned layer imitates: the outputs of the dense model, or (as published) its own outputs
            before it was pruned, given the pruned model's inputs.
        prunable: which leaves are pruned, as in `make_masks`; recipes as published keep the head of a language model
            (``lm_head``) dense, which is pruned here like any other kernel unless it is left out.
        sites: as in `make_masks`.
        on_layer: called with ``(path, index, weights, mask)`` as soon as a layer is finished, to store it or to show how
            far it is: ``leaf[index]`` of the leaf at this path is what was pruned, ``(3,)`` for layer 3 of a stack, ``()``
            for a leaf that is no stack.

    Returns:
        What the method returns: the pruned parameters and their masks, of the treedef of params, True = keep; a `Quantized` where
        the method returns one.

    Raises:
        ValueError: there is no batch, a batch has another shape than the first, a prunable parameter multiplies no data
            in a way that is understood, or target is neither; and whatever the method raises.
        TypeError: a leaf to prune is complex.

    >>> import functools, jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = [jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])]
    >>> method = functools.partial(jaxprune.oneshot.sparsegpt, k=0.5, damping=0.0)
    >>> pruned, masks = sequential(lambda params, x: x @ params["kernel"], params, data, method)
    >>> pruned["kernel"].ravel().tolist()
    [0.0, 2.5]

    Reference: Frantar, Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023,
    section 3 (layer by layer); the target is that of least squares between the two models' activations.
    """
    require_target(target, "sequential")
    held = all_inputs(batches)
    reading = read(fn, params, held[0])
    flat = reading.flat
    chosen = read_params(params, prunable=prunable, sites=sites).prunable
    for name, leaf, fits in zip(flat.names, flat.leaves, chosen, strict=True):
        if fits:
            require_real(leaf, name, "sequential")
    paths = {path for path, fits in zip(flat.paths, chosen, strict=True) if fits}
    for path in paths:
        sites_of(Grams(reading.sites, {}, {}), path, "sequential")
    masks = [all_true(leaf) for leaf in flat.leaves]
    pruner = _Pruner(reading, method, target, list(flat.leaves), masks, on_layer)
    planned = reading.in_order(paths)
    at_once = paths - {site.path for site, _ in planned.values()}
    if at_once:
        found = calibrate_grams(fn, params, held, where=lambda site: site.path in at_once)
        for path in at_once:
            pruner.prune(path, found)
    if planned:
        pruner.run(held, planned)
    leaves = [own(new) if new is old else new for new, old in zip(pruner.leaves, flat.leaves, strict=True)]
    codes = {path: stack(layers) for path, layers in pruner.codes.items()}
    return together(flat.build(leaves), flat.build(pruner.masks), codes)


def require_target(target: str, title: str) -> None:
    """Raise a ValueError for what is none of the two targets."""
    if target not in ("dense", "current"):
        raise ValueError(f'{title} takes target="dense" or "current", not {target!r}.')


class _Pruner:
    """The parameters as they are pruned, one after the other."""

    def __init__(
        self,
        reading: Reading,
        method: Method[Any],
        target: str,
        leaves: list[Any],
        masks: list[jax.Array],
        on_layer: OnLayer,
    ) -> None:
        self.leaves = leaves
        self.masks = masks
        # By path and index of a layer within its stack.
        self.codes: collections.defaultdict[str, dict[tuple[int, ...], Codes]] = collections.defaultdict(dict)
        self._reading = reading
        self._method = method
        self._target = target
        self._on_layer = on_layer

    def prune(self, path: str, found: Grams) -> None:
        """Prune a leaf by its sites in `found`."""
        flat = self._reading.flat
        position = flat.paths.index(path)
        only = Grams(found.sites.select(lambda site: site.path == path), found.sums, found.counts)
        weights, mask = self._call(path, (), jnp.asarray(self.leaves[position]), only)
        self.leaves[position], self.masks[position] = weights, self.masks[position] & mask
        self._on_layer(path, (), weights, self.masks[position])

    def run(self, held: Sequence[tuple[Any, ...]], planned: Planned) -> None:
        """Evaluate the function for all batches, and prune where data meets parameters."""
        flat = self._reading.flat
        weights = Weights(list(flat.leaves), list(self.leaves))
        left = _visits(planned)
        inputs = [list(arrays) for arrays in zip(*map(jax.tree.leaves, held), strict=True)]
        operands = {at: use.operands for at, (_, use) in planned.items()}
        lockstep = Lockstep(weights, operands, dense=self._target == "dense")
        for stop in lockstep.stops(self._reading.body, inputs):
            site, use = planned[stop.place, stop.number]
            position = flat.paths.index(site.path)
            cut = site.leading
            index, alone = stop.layers[:cut], site.slice().entry(stop.layers[cut:])
            leaf, mask = self._prune_one(position, index, alone, use.contraction, stop.data)
            weights.replace(position, self.leaves[position])
            left[site.path, index] -= 1
            if not left[site.path, index]:
                del left[site.path, index]
                self._on_layer(site.path, index, leaf, mask)
            if not left:
                break  # nothing is evaluated behind the last one

    def _prune_one(
        self, position: int, index: tuple[int, ...], site: Site, contraction: Contraction, data: Lanes
    ) -> tuple[jax.Array, jax.Array]:
        """Prune what one site sees of a leaf, or of one layer of it; return that leaf or layer, and its mask."""
        flat = self._reading.flat
        gram, counts = _sum(_grams(contraction, tuple(x)) for x in zip(*(lane.current for lane in data), strict=True))
        whole = jnp.asarray(self.leaves[position])
        leaf = whole[index] if index else whole
        moved = any(lane.current is not lane.dense for lane in data)
        if self._target == "dense" and moved and contraction.kind in ("dot", "conv"):
            pairs = zip(data[0].current, data[0].dense, strict=True)
            leaf = aim(site, leaf, gram, _sum(_cross_products(contraction, x, y) for x, y in pairs))
        group = site.groups[0]
        found = Grams(Sites((site,)), {group: gram}, {group: counts})
        leaf, mask = self._call(site.path, index, leaf, found)
        if not index:
            self.leaves[position], self.masks[position] = leaf, self.masks[position] & mask
            return leaf, self.masks[position]
        mask &= self.masks[position][index]
        if self.leaves[position] is flat.leaves[position]:
            whole = whole.copy()  # the stack that was given stays
        self.leaves[position] = _put_layer(whole, leaf, index)
        self.masks[position] = _put_layer(self.masks[position], mask, index)
        return leaf, mask

    def _call(self, path: str, index: tuple[int, ...], leaf: jax.Array, found: Grams) -> tuple[jax.Array, jax.Array]:
        """Call the method for a leaf, or one layer of it, and keep the codes that it finds."""
        weights, mask, codes = call(self._method, self._reading.flat, path, leaf, found)
        if codes is not None:
            self.codes[path][index] = codes
        return weights, mask


def _visits(planned: Planned) -> collections.Counter[tuple[str, tuple[int, ...]]]:
    """How often data meets each layer, by path and index: several times where the sites are parts of a parameter."""
    found: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    for site, _ in planned.values():
        sizes = [step.size for step in site.steps if isinstance(step, Each)]
        for index in itertools.product(*map(range, sizes[: site.leading])):
            found[site.path, index] += math.prod(sizes[site.leading :])
    return found


@functools.partial(jax.jit, donate_argnums=0)
def _put_layer(stack: jax.Array, layer: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """Write a layer into its stack, in the same memory."""

    def put(stack: jax.Array, layer: jax.Array) -> jax.Array:
        layer = layer.reshape((1,) * len(index) + layer.shape)
        return jax.lax.dynamic_update_slice(stack, layer, (*index, *(0,) * (stack.ndim - len(index))))

    return without_explicit_axes(put, stack)(stack, layer)


def aim(site: Site, leaf: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
    """Return a leaf with the weights at a site that bring its outputs on pruned inputs closest to the dense ones.

    Args:
        site: of the leaf.
        leaf: its weights W.
        gram: of the pruned model's inputs X~, ``X~'X~`` [N, I, I].
        cross: of both models' inputs, ``X~'X`` [N, I, I].
    """
    return site.put(leaf, through_compiler(_aim, site.matrices(leaf).astype(jnp.float32), gram, cross))


_grams = jax.jit(grams, static_argnums=0)
_cross_products = jax.jit(cross_products, static_argnums=0)


def _sum(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda total, part: jax.tree.map(jnp.add, total, part), parts)


@jax.jit
def _aim(weights: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
    """The weights [N, I, O] that bring the outputs on pruned inputs closest to the dense ones, in the damped sense.

    ``(H + d I)^-1 (G + d I) W`` is ``W + (H + d I)^-1 (G - H) W``.
    """

    def one(weights: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
        factor = factorise(gram, jnp.float32(_DAMPING))
        live = ~factor.dead
        mean = jnp.sum(jnp.where(live, jnp.diagonal(gram), 0.0)) / jnp.maximum(jnp.sum(live, dtype=gram.dtype), 1)
        missing = jnp.matmul(cross - gram, weights, precision="highest") / jnp.where(mean > 0, mean, 1.0)
        half = jax.lax.linalg.triangular_solve(factor.root, missing, left_side=True, lower=False)
        change = jax.lax.linalg.triangular_solve(factor.root, half, left_side=True, lower=False, transpose_a=True)
        return weights + jnp.where(live[:, None] & jnp.isfinite(change), change, 0.0)

    return jax.vmap(one)(weights, gram, cross)
