"""The pass itself: every site of every leaf that is rounded, as matrices on a grid of integers."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import own, require_real
from jaxprune._tree._masks import all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._codes import Codes, Layout, read_layout
from jaxprune.oneshot._eliminate import Decide, eliminate, nested
from jaxprune.oneshot._grid import Grid, decode
from jaxprune.oneshot._pattern import Pattern
from jaxprune.oneshot._solve import Solution, for_each, grams_in, put_in, report
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._factorise import factorise, inverse_root
from jaxprune.sites._matrices import as_matrices, sites_of
from jaxprune.sites._sites import Site, Sites

# Rows whose masks are chosen together where the groups of scales do not say it, as in `sparsegpt`.
_MASK_BLOCK = 32

# (site, its layout, its matrices in that order) -> the masks, or the pattern's strengths.
Given = Callable[[Site, Layout, jax.Array], jax.Array]


class Options(NamedTuple):
    """What was asked for; the fields have the words of `gptq`, and `title` is the function's name in messages."""

    title: str
    grid: Grid
    group_size: int | None
    damping: float
    block: int
    act_order: bool = False


class _Found(NamedTuple):
    """What became of the matrices of one site; `scale` and `zero` of each group, the others of each weight."""

    weights: jax.Array
    mask: jax.Array
    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    damping: jax.Array
    condition: jax.Array


def round_sites(
    params: Any,
    grams: Grams,
    given: Given,
    pattern: Pattern | None,
    options: Options,
    prunable: Prunable,
    sites: Sites | None,
) -> tuple[list[Any], list[jax.Array], dict[str, Codes]]:
    """Round every leaf that is chosen, and prune it by a pattern where there is one.

    Args:
        params: a pytree of arrays, those that the Gram matrices are of.
        grams: of the function that uses them.
        given: the masks of a site's matrices, or with a pattern its strengths.
        pattern: which weights go, or None.
        options: what was asked for.
        prunable: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        The leaves, their masks, and the codes of those that were rounded by their paths.
    """
    read_arrays(params, "params")
    flat = grams.sites.require_params(params)
    chosen = read_params(params, prunable=prunable, sites=sites).prunable
    leaves, masks, codes = [], [], {}
    for path, name, leaf, fits in zip(flat.paths, flat.names, flat.leaves, chosen, strict=True):
        if not fits:
            leaves.append(own(leaf))
            masks.append(all_true(leaf))
            continue
        require_real(leaf, name, options.title)
        rounded, mask, codes[path] = _round_leaf(
            leaf, sites_of(grams, path, options.title), grams, given, pattern, options
        )
        leaves.append(rounded)
        masks.append(mask)
    return leaves, masks, codes


def _round_leaf(
    leaf: jax.Array, sites: tuple[Site, ...], grams: Grams, given: Given, pattern: Pattern | None, options: Options
) -> tuple[jax.Array, jax.Array, Codes]:
    if sum(math.prod(site.matrix_shape) for site in sites) != leaf.size:
        raise ValueError(
            f"Of {sites[0].name} only a part multiplies the data measured here: the rest would have no codes. Leave it as it is "
            "with prunable=..."
        )
    mask = all_true(leaf)
    codes, zero = jnp.zeros_like(leaf, dtype=jnp.int8), jnp.zeros_like(leaf, dtype=jnp.int8)
    scale = jnp.zeros_like(leaf, dtype=jnp.float32)
    for site in sites:
        layout = read_layout(site, options.group_size, 1 if pattern is None else pattern.group)
        weights = layout.ordered(as_matrices(site, leaf))
        found = _solve(
            weights,
            grams_in(grams, site, layout.order),
            given(site, layout, weights),
            options.damping,
            pattern=pattern,
            grid=options.grid,
            length=layout.length,
            block=options.block,
            act_order=options.act_order,
        )
        report(Solution(found.weights, found.mask, found.damping, found.condition), site.name, options.damping)
        put = functools.partial(put_in, site, order=layout.order)
        leaf, mask, codes = put(leaf, found.weights), put(mask, found.mask), put(codes, found.codes)
        scale, zero = put(scale, layout.rows(found.scale)), put(zero, layout.rows(found.zero))
    return leaf, mask, Codes(codes, layout.first(scale), layout.first(zero), options.grid.bits)


@functools.partial(jax.jit, static_argnames=("pattern", "grid", "length", "block", "act_order"))
def _solve(
    weights: jax.Array,
    grams: jax.Array,
    given: jax.Array,
    damping: float,
    *,
    pattern: Pattern | None,
    grid: Grid,
    length: int,
    block: int,
    act_order: bool,
) -> _Found:
    def of_one(weights: jax.Array, gram: jax.Array, given: jax.Array) -> _Found:
        keep = given if pattern is None else jnp.ones(weights.shape, bool)
        scales = None
        if act_order:
            of_groups = _fit(grid, weights, keep, length)
            order = jnp.argsort(-jnp.diagonal(gram))
            each = [jnp.repeat(array, length, axis=0)[order] for array in of_groups]
            scales = (each[0], each[1])
            weights, gram, keep = weights[order], gram[order][:, order], keep[order]
        factor = factorise(gram, jnp.float32(damping))
        root = inverse_root(factor.root)
        choose = None if pattern is None else _chooser(pattern, given, factor.dead)
        found, (mask, scale, zero, codes) = _pass(
            weights, root, keep, scales, choose, pattern, grid=grid, length=length, block=block
        )
        if act_order:
            found, mask, codes = (jnp.zeros_like(array).at[order].set(array) for array in (found, mask, codes))
            scale, zero = of_groups
        else:
            scale, zero = scale[::length], zero[::length]
        return _Found(found, mask, codes, scale, zero, factor.damping, factor.condition)

    # A scale is sharded as the outputs are.
    sharded: Any = (True, True, True, True, True, False, False)
    return for_each(of_one, weights, grams, given, out=_Found(*sharded))


def _fit(grid: Grid, weights: jax.Array, keep: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The scale and the code of zero of each group of so many rows: two arrays [groups, outputs]."""
    rows, outputs = weights.shape
    padding = ((0, -rows % length), (0, 0))
    groups = [jnp.pad(array, padding).reshape(-1, length, outputs) for array in (weights, keep)]
    return jax.vmap(grid.fit)(*groups)


def _chooser(pattern: Pattern, strength: jax.Array, dead: jax.Array) -> Decide:
    """Say which weights of some rows stay, as `sparsegpt` does: weights of dead inputs go first, padding never."""
    inputs = len(dead)

    def choose(rows: jax.Array, pivots: jax.Array, _: Any, first: Any) -> jax.Array:
        at = first + jnp.arange(len(rows))
        scores = jnp.where(dead[jnp.minimum(at, inputs - 1), None], 0.0, jnp.abs(rows / pivots[:, None]))
        return pattern.choose(jnp.where((at < inputs)[:, None], scores, jnp.inf), strength, first, inputs)

    return choose


def _pass(
    weights: jax.Array,
    root: jax.Array,
    keep: jax.Array,
    scales: tuple[jax.Array, jax.Array] | None,
    choose: Decide | None,
    pattern: Pattern | None,
    *,
    grid: Grid,
    length: int,
    block: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """Go through the rows of a matrix [inputs, outputs]; return them, and of each weight its mask, scale, zero and code.

    Args:
        weights: the matrix.
        root: the upper triangular U of ``H^-1 = U^T U``.
        keep: its mask, where nothing is to be chosen.
        scales: the scale and the code of zero of each weight; None finds those of a group when its turn comes.
        choose: which weights of some rows stay; None takes `keep`.
        pattern: what `choose` looks at.
        grid: the integers.
        length: rows that share a scale.
        block: rows after which errors are handed on to all later rows.
    """
    inputs, _ = weights.shape
    within, block = _blocks(inputs, length, block, pattern)
    rows = inputs + -inputs % block
    pivots = jnp.pad(jnp.diagonal(root), (0, rows - inputs), constant_values=1.0)

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, rows - inputs), (0, 0)))

    def masks(rows: jax.Array, pivots: jax.Array, known: Any, first: Any) -> Any:
        return known if choose is None else (choose(rows, pivots, None, first), *known[1:])

    def find_scales(rows: jax.Array, _: jax.Array, known: Any, __: Any) -> Any:
        if scales is not None:
            return known
        keep, *_, codes = known
        scale, zero = (jnp.broadcast_to(array, rows.shape) for array in grid.fit(rows, keep))
        return keep, scale, zero, codes

    def both(*arguments: Any) -> Any:
        rows, pivots, known, first = arguments
        return find_scales(rows, pivots, masks(rows, pivots, known, first), first)

    def settle(rows: jax.Array, known: Any) -> tuple[jax.Array, Any]:
        keep, scale, zero, _ = known
        codes = jnp.where(keep, grid.encode(rows, scale, zero), zero)
        return decode(codes, scale, zero), (keep, scale, zero, codes)

    shared = rows if length >= inputs else length
    nothing = (jnp.ones_like(weights), jnp.zeros_like(weights, dtype=jnp.int8)) if scales is None else scales
    known = tuple(padded(array) for array in (keep, *nothing, jnp.zeros_like(weights, dtype=jnp.int8)))
    settled, _, known = eliminate(
        padded(weights),
        jnp.pad(root, (0, rows - inputs)),
        pivots,
        (known[0], jnp.where(known[1] > 0, known[1], 1.0), known[2], known[3]),
        0,
        sizes=nested(rows, block, within),
        decide={within: both} if shared == within else {shared: find_scales, within: masks},
        settle=settle,
    )
    keep, scale, zero, codes = (array[:inputs] for array in known)
    return settled[:inputs], (keep, scale, zero, codes)


def _blocks(inputs: int, length: int, block: int, pattern: Pattern | None) -> tuple[int, int]:
    """How many rows have their masks, or their scales, found together; and after how many errors are handed on to all."""
    if length < inputs:
        within = length
    elif pattern is None or (pattern.counts and not pattern.by_unit):
        within = min(_MASK_BLOCK, block)
    else:
        within = pattern.group if not pattern.counts else block
    within = min(within, -(-inputs // (pattern.group if pattern else 1)) * (pattern.group if pattern else 1))
    return within, max(1, min(block // within, -(-inputs // within))) * within
