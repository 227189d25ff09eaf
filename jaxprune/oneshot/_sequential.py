"""Prune layer by layer: each layer is calibrated on the outputs of the layers already pruned."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating, own, require_real
from jaxprune._tree._masks import all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Predicate, Prunable
from jaxprune._tree._sharding import through_compiler
from jaxprune.sites._accumulate import cross_products, grams
from jaxprune.sites._calibrate import Grams, all_inputs, calibrate_grams
from jaxprune.sites._contractions import Contraction
from jaxprune.sites._factorise import factorise
from jaxprune.sites._find import Planned, Reading, read
from jaxprune.sites._lanes import Lanes, Lockstep, Weights
from jaxprune.sites._matrices import sites_of
from jaxprune.sites._sites import Site, Sites

# How much is added to the diagonal of a Gram matrix, as a share of its mean, to find the weights to aim at.
_DAMPING = 0.01


class Method(Protocol):
    """A method that prunes a tree of parameters, as `sparsegpt` and `admm` do once their strength is given."""

    def __call__(self, params: Any, grams: Grams, /, *, prunable: Predicate) -> tuple[Any, Any]:
        """Return the pruned parameters and their masks."""


def sequential(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Method,
    *,
    target: Literal["dense", "current"] = "dense",
    prunable: Prunable = None,
    sites: Sites | None = None,
) -> tuple[Any, Any]:
    """Prune layer by layer, in the order in which the function uses them, each on what the pruned layers before give.

    Evaluates the function once for all batches in lockstep. Where data meets a prunable parameter, its Gram matrix is
    taken on the pruned model's activations X~, the method prunes it, and evaluation goes on with the pruned weights.
    With ``target="dense"`` the dense model is evaluated beside it, and the method is given not the weights W but those
    that come closest to the dense model's outputs X W on the pruned model's inputs X~,
    ``W* = (X~'X~ + d I)^-1 (X~'X + d I) W``, so that each layer also makes up for the errors of those before.

    The layers of a scan are pruned one after the other. What is read more than once with other inputs (the weights
    of a recurrent cell, tied weights, whatever stands within while or cond) is pruned first, in one go, on the
    dense model's activations. Keeps the activations of all batches that are still needed at any one time: of a
    transformer its residual stream. Not for use under jit.

    Args:
        fn: ``fn(params, *inputs)``, as in `calibrate_grams`.
        params: a pytree of arrays.
        batches: an iterable of inputs of equal shapes, as in `calibrate_grams`; all are kept.
        method: ``(params, grams, prunable=...) -> (params, masks)``, for example
            ``functools.partial(jaxprune.oneshot.sparsegpt, k=0.5)``. It is called for one parameter, or one layer of a stack, at
            a time: a tree prefix k reaches it whole, but k cannot differ within a stack.
        target: what the pruned layer imitates: the outputs of the dense model, or (as published) its own outputs
            before it was pruned, given the pruned model's inputs.
        prunable: which leaves are pruned, as in `make_masks`; recipes as published keep the head of a language model
            (``lm_head``) dense, which is pruned here like any other kernel unless it is left out.
        sites: as in `make_masks`.

    Returns:
        The pruned parameters and their masks, of the treedef of params; True = keep.

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
    if target not in ("dense", "current"):
        raise ValueError(f'sequential takes target="dense" or "current", not {target!r}.')
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
    pruner = _Pruner(reading, method, target, list(flat.leaves), masks)
    planned = reading.in_order(paths)
    at_once = paths - {site.path for site, _ in planned.values()}
    if at_once:
        found = calibrate_grams(fn, params, held, where=lambda site: site.path in at_once)
        for path in at_once:
            pruner.prune(path, found)
    if planned:
        pruner.run(held, planned)
    leaves = [own(new) if new is old else new for new, old in zip(pruner.leaves, flat.leaves, strict=True)]
    return flat.build(leaves), flat.build(pruner.masks)


class _Pruner:
    """The parameters as they are pruned, one after the other."""

    def __init__(
        self, reading: Reading, method: Method, target: str, leaves: list[Any], masks: list[jax.Array]
    ) -> None:
        self.leaves = leaves
        self.masks = masks
        self._reading = reading
        self._method = method
        self._target = target

    def prune(self, path: str, found: Grams) -> None:
        """Prune a leaf by its sites in `found`."""
        flat = self._reading.flat
        position = flat.paths.index(path)
        # Other leaves are here only for the sake of tree prefixes.
        tree = {other: jnp.zeros(()) for other, leaf in zip(flat.paths, flat.leaves, strict=True) if is_floating(leaf)}
        tree[path] = jnp.asarray(self.leaves[position])
        only = Grams(found.sites.select(lambda site: site.path == path), found.sums, found.counts)
        weights, masks = self._method(tree, only, prunable=lambda other, _: other == path)
        self.leaves[position] = weights[path]
        self.masks[position] = self.masks[position] & masks[path]

    def run(self, held: Sequence[tuple[Any, ...]], planned: Planned) -> None:
        """Evaluate the function for all batches, and prune where data meets parameters."""
        weights = Weights(list(self._reading.flat.leaves), list(self.leaves))
        number = sum(site.layers for site, _ in planned.values())  # nothing is evaluated behind the last one
        inputs = [list(arrays) for arrays in zip(*map(jax.tree.leaves, held), strict=True)]
        operands = {at: use.operands for at, (_, use) in planned.items()}
        lockstep = Lockstep(weights, operands, dense=self._target == "dense")
        for stop in itertools.islice(lockstep.stops(self._reading.body, inputs), number):
            site, use = planned[stop.place, stop.number]
            self._prune_one(site.entry(stop.layers), use.contraction, stop.data)
            position = self._reading.flat.paths.index(site.path)
            weights.replace(position, self.leaves[position])

    def _prune_one(self, site: Site, contraction: Contraction, data: Lanes) -> None:
        gram, counts = _sum(_grams(contraction, tuple(x)) for x in zip(*(lane.current for lane in data), strict=True))
        group = site.groups[0]
        position = self._reading.flat.paths.index(site.path)
        moved = any(lane.current is not lane.dense for lane in data)
        if self._target == "dense" and moved and contraction.kind in ("dot", "conv"):
            pairs = zip(data[0].current, data[0].dense, strict=True)
            cross = _sum(_cross_products(contraction, x, y) for x, y in pairs)
            leaf = jnp.asarray(self.leaves[position])
            aim = through_compiler(_aim, site.matrices(leaf).astype(jnp.float32), gram, cross)
            self.leaves[position] = site.put(leaf, aim)
        self.prune(site.path, Grams(Sites((site,)), {group: gram}, {group: counts}))


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
