"""From trees to matrices and back: every site of every leaf that is pruned, one method for all."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32

from jaxprune._tree._leaves import is_known, own, require_real
from jaxprune._tree._masks import all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._pattern import Pattern
from jaxprune.rules._layers import is_scalar
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.sites._factorise import Factor, factorise
from jaxprune.sites._matrices import as_matrices, sites_of
from jaxprune.sites._sites import LEAVE_DENSE, Site, Sites

# Matrices of up to so many entries, with their Gram matrices, are solved side by side; larger ones one by one.
_SIDE_BY_SIDE = 2**20


class DampingWarning(UserWarning):
    """A Gram matrix was singular to working precision, and more was added to its diagonal than was asked for."""


class Solution(NamedTuple):
    """What a method finds for the matrices of one site.

    Attributes:
        weights: the weights found.
        mask: True = keep.
        damping: the share of the mean diagonal that was added to each Gram matrix.
        condition: a lower bound of the condition number before more than asked for was added.
    """

    weights: Float32[Array, "*n inputs outputs"]
    mask: Bool[Array, "*n inputs outputs"]
    damping: Float32[Array, "*n"]
    condition: Float32[Array, "*n"]


# (weights [N, I, O], grams [N, I, I], a third array for each matrix or weight) -> Solution
Method = Callable[[jax.Array, jax.Array, jax.Array], Solution]


def prune_sites(
    params: Any,
    grams: Grams,
    k: Any,
    method: Method,
    *,
    title: str,
    pattern: Pattern,
    damping: float,
    prunable: Prunable,
    sites: Sites | None,
) -> tuple[Any, Any]:
    """Prune every prunable leaf by a method that takes matrices, Gram matrices and the pattern's strengths.

    Args:
        params: a pytree of arrays.
        grams: of the function that uses them.
        k: the strength: a number, a scalar array or a tree prefix.
        method: what to do with the matrices of one site.
        title: the method's name for messages.
        pattern: which weights of a matrix the method removes.
        damping: what the method was asked to add, for messages.
        prunable: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        The pruned parameters and their masks.
    """
    read_arrays(params, "params")
    require_grams(grams, f"{title}(params, grams, k)")
    flat = grams.sites.require_params(params)
    chosen = read_params(params, prunable=prunable, sites=sites).prunable
    ks = [k] * len(flat.paths) if is_scalar(k) else flat.spread(k, "k")
    leaves, masks = [], []
    for path, name, leaf, fits, strength in zip(flat.paths, flat.names, flat.leaves, chosen, ks, strict=True):
        mask = all_true(leaf)
        if fits:
            require_real(leaf, name, title)
        for site in sites_of(grams, path, title) if fits else ():
            weights, order = in_groups(site, leaf, pattern.group)
            found = method(weights, grams_in(grams, site, order), pattern.strength(strength, name, weights))
            report(found, name, damping)
            leaf = put_in(site, leaf, found.weights, order)
            mask = put_in(site, mask, found.mask, order)
        leaves.append(leaf if fits else own(leaf))
        masks.append(mask)
    return flat.build(leaves), flat.build(masks)


def in_groups(site: Site, leaf: Any, group: int) -> tuple[jax.Array, np.ndarray | None]:
    """The leaf as matrices whose neighbouring rows form groups, and the order of rows where that is another one."""
    matrices = as_matrices(site, leaf)
    if group == 1 or site.operation != "conv":
        return matrices, None
    if site.input_axis is None:
        raise ValueError(
            f"The inputs of {site.name} run along axes {site.in_axes} of {site.shape}, not along one: they form no "
            f"groups of {group}. {LEAVE_DENSE}"
        )
    # Rows run over the window for each channel; groups are of channels.
    channels = site.shape[site.input_axis]
    if channels % group:
        raise ValueError(f"Groups of {group} do not divide the {channels} input channels of {site.name}. {LEAVE_DENSE}")
    order = np.arange(site.matrix_shape[1]).reshape(channels, -1).T.ravel()
    return matrices[:, order], order


def grams_in(grams: Grams, site: Site, order: np.ndarray | None) -> jax.Array:
    """The Gram matrices of a site in float32, with rows and columns in another order."""
    gram = grams.of(site).astype(jnp.float32)
    return gram if order is None else gram[:, order][:, :, order]


def put_in(site: Site, leaf: jax.Array, matrices: jax.Array, order: np.ndarray | None) -> jax.Array:
    """Put matrices whose rows stand in another order into the leaf."""
    return site.put(leaf, matrices if order is None else matrices[:, np.argsort(order)])


def report(found: Solution, name: str, damping: float) -> None:
    """Say where a Gram matrix was singular or not a number, unless it is traced."""
    if not is_known(found.damping):
        return
    used, condition = np.asarray(found.damping), np.asarray(found.condition)
    if not np.isfinite(used).all():
        raise ValueError(
            f"The Gram matrix of {name} is not finite: some calibration data or activations are NaN or infinite. "
            f"Look at the batches. {LEAVE_DENSE}"
        )
    raised = used > damping * (1 + 1e-6)
    if raised.any():
        worst = condition[raised].max()
        shown = f"has a condition number of at least {worst:.1g}" if np.isfinite(worst) else "is singular"
        warnings.warn(
            f"In float32 the Gram matrix of {name} {shown} (fewer samples than features, or features that depend on "
            f"each other): damping was raised from {damping:g} to {used.max():.1g} of its mean diagonal. More samples, "
            "or a larger damping=..., avoid this.",
            DampingWarning,
            stacklevel=4,
        )


def solve_each(
    solve: Callable[[jax.Array, Factor, Any], tuple[jax.Array, jax.Array]],
    weights: Float32[Array, "n inputs outputs"],
    grams: Float32[Array, "n inputs inputs"],
    others: Any,
    damping: Float32[Array, ""],
) -> Solution:
    """Solve for each of N matrices by itself; small ones side by side.

    Args:
        solve: (weights [inputs, outputs], the factorised Gram matrix, the matrix's entry of `others`) -> weights, mask.
            It sees weights of dead features as zeros, which go first; those it keeps stay what they were.
        weights: the matrices.
        grams: their Gram matrices.
        others: a tree of arrays with an entry for each matrix, which `solve` takes.
        damping: the share of the mean diagonal to add.
    """

    def of_one(weights: jax.Array, gram: jax.Array, other: Any) -> Solution:
        factor = factorise(gram, damping)
        dead = factor.dead[:, None]
        found, mask = solve(jnp.where(dead, 0.0, weights), factor, other)
        return Solution(jnp.where(mask & dead, weights, found), mask, factor.damping, factor.condition)

    sharded: Any = (True, True, False, False)
    return for_each(of_one, weights, grams, others, out=Solution(*sharded))


Out = TypeVar("Out")


def for_each(
    of_one: Callable[[jax.Array, jax.Array, Any], Out],
    weights: Float32[Array, "n inputs outputs"],
    grams: Float32[Array, "n inputs inputs"],
    others: Any,
    *,
    out: Any,
) -> Out:
    """Call a function of one matrix for each of N, side by side where they are small.

    On a mesh with Explicit axes the work is left to the compiler.

    Args:
        of_one: (weights [inputs, outputs], gram [inputs, inputs], the matrix's entry of `others`) -> a tree of arrays.
        weights: the matrices.
        grams: their Gram matrices.
        others: a tree of arrays with an entry for each matrix.
        out: a tree of bools as what `of_one` returns: whether an array [N, rows, outputs] of the result is sharded as the
            weights; what is not is whole on every device.
    """

    def of_all(*arrays: Any) -> Any:
        n, inputs, outputs = weights.shape
        if n == 1:
            return jax.tree.map(lambda array: array[None], of_one(*jax.tree.map(lambda array: array[0], arrays)))
        if n * inputs * (inputs + outputs) <= _SIDE_BY_SIDE:
            return jax.vmap(of_one)(*arrays)
        return jax.lax.map(lambda each: of_one(*each), arrays)

    sharding = jax.typeof(weights).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return of_all(weights, grams, others)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    shardings = jax.tree.map(lambda as_weights: sharding if as_weights else whole, out)
    return jax.sharding.auto_axes(of_all, out_sharding=shardings)(weights, grams, others)
