"""Weights rounded to integers, input by input, while the inputs to come make up for the error of each; pruned on the way."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import rules
from jaxprune._tree._masks import align_masks
from jaxprune._tree._prunable import Prunable
from jaxprune.oneshot._codes import Layout, Quantized
from jaxprune.oneshot._grid import read_grid
from jaxprune.oneshot._pattern import read_pattern
from jaxprune.oneshot._rounding import Options, round_sites
from jaxprune.rules._layers import is_scalar
from jaxprune.rules._rule import AnyRule
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.sites._factorise import check_damping
from jaxprune.sites._sites import Site, Sites


def gptq(
    params: Any,
    grams: Grams,
    *,
    masks: Any = None,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
    prunable: Prunable = None,
    sites: Sites | None = None,
) -> Quantized:
    """Round weights to integers by GPTQ, and let those to the right make up for the error; pruned weights stay zero.

    The inputs of every layer are gone through in order, as in `sparsegpt`: each weight moves to the nearest number of its
    group's grid, and its unit's later weights move so that the layer's outputs on the calibration data change least. What
    masks remove is exactly zero, before, in and after, whatever the rounding; what is rounded to zero stays kept.

    Args:
        params: a pytree of arrays; under masks, the pruned parameters (those that `admm` or `reconstruct` found).
        grams: from `calibrate_grams` of the function that uses them.
        masks: their masks, True = keep; None keeps everything.
        bits: of a code, 2 to 8 (static).
        group_size: how many inputs of an output share a scale at most, >= 2; None for all (static). A group's scale is found when
            its turn comes, from the weights that stay, as the errors before have left them. Groups lie along the last axis of
            inputs in memory, over the one before as well where that is shorter.
        symmetric: whether zero has the code 0, in the middle; otherwise the codes are spread between the smallest and the largest
            weight of a group, zero among them (static).
        act_order: whether to begin with the inputs of the largest mean square, in place of the order in which they stand. Scales
            are then found from the weights as they were; which weights share one does not change (static).
        damping: as in `sparsegpt`.
        block: after how many inputs errors are handed on to all later ones; changes the speed only (static).
        prunable: which leaves are rounded, as in `make_masks` those that are pruned.
        sites: as in `make_masks`.

    Returns:
        The parameters, the masks and the codes; a leaf that is not rounded has no codes and keeps its values.

    Raises:
        ValueError: a leaf to round multiplies no calibrated data, or is of another shape; its inputs cannot be cut into such
            groups; a Gram matrix is not finite; an option is none of the above. The message names the leaf.
        TypeError: a leaf to round is complex.

    Warns:
        DampingWarning: damping was raised, as in `sparsegpt`.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.25], [3.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])  # [[2, 1], [1, 2]]
    >>> found = gptq(params, grams, bits=2, symmetric=False, damping=0.0)
    >>> found.params["kernel"].ravel().tolist(), found.codes["kernel"].codes.ravel().tolist()
    ([1.0, 3.0], [-1, 1])

    Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", 2022, algorithm 1.
    """
    options = _checked(bits, symmetric, group_size, damping, block, "gptq")._replace(act_order=bool(act_order))
    require_grams(grams, "gptq(params, grams)")
    flat = grams.sites.require_params(params)
    aligned = [None] * len(flat.paths) if masks is None else align_masks(masks, flat)
    given = dict(zip(flat.paths, aligned, strict=True))

    def keep(site: Site, layout: Layout, weights: jax.Array) -> jax.Array:
        mask = given[site.path]
        return jnp.ones(weights.shape, bool) if mask is None else layout.ordered(site.matrices(mask))

    leaves, found, codes = round_sites(params, grams, keep, None, options, prunable, sites)
    kept = [there if given[path] is None else given[path] for path, there in zip(flat.paths, found, strict=True)]
    return Quantized(flat.build(leaves), flat.build(kept), codes)


def prune_and_quantize(
    params: Any,
    grams: Grams,
    k: Any,
    *,
    rule: AnyRule = rules.layer_sparsity,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    damping: float = 0.01,
    block: int = 128,
    prunable: Prunable = None,
    sites: Sites | None = None,
) -> Quantized:
    """Prune by SparseGPT and round by GPTQ in one pass: later weights make up for what is pruned and for what is rounded.

    A weight is pruned first and what stays is rounded; which weights go is decided as in `sparsegpt`, from the weights as the
    errors before have left them, for a whole group of a scale at a time, so that the scale is that of what stays. Where all
    inputs of an output share one scale, it is found from the weights before any goes.

    Args:
        params: a pytree of arrays.
        grams: from `calibrate_grams` of the function that uses them.
        k: as in `sparsegpt`.
        rule: as in `sparsegpt`.
        bits: as in `gptq`.
        group_size: as in `gptq`; with ``rules.n_m(m)``, a multiple of m.
        symmetric: as in `gptq`.
        damping: as in `sparsegpt`.
        block: as in `gptq`.
        prunable: which leaves are pruned and rounded, as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        The parameters, the masks and the codes.

    Raises:
        ValueError: as in `sparsegpt` and `gptq`.
        TypeError: as in `sparsegpt`.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.25], [255 / 64]])}
    >>> data = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])
    >>> found = prune_and_quantize(params, grams, 1 / 3, bits=8, symmetric=False, damping=0.0)
    >>> found.params["kernel"].ravel().tolist()  # the second makes up for the first: 2.25 + 1 * 1/2
    [0.0, 2.75, 3.984375]
    >>> found.codes["kernel"].codes.ravel().tolist(), found.codes["kernel"].scale.item()
    ([-128, 48, 127], 0.015625)

    Reference: Frantar, Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot", 2023, section
    3.5 (joint sparsification and quantization).
    """
    options = _checked(bits, symmetric, group_size, damping, block, "prune_and_quantize")
    pattern = read_pattern(rule, options.title)
    require_grams(grams, "prune_and_quantize(params, grams, k)")
    flat = grams.sites.require_params(params)
    ks = dict(zip(flat.paths, [k] * len(flat.paths) if is_scalar(k) else flat.spread(k, "k"), strict=True))

    def strength(site: Site, layout: Layout, weights: jax.Array) -> jax.Array:
        del layout
        return pattern.strength(ks[site.path], site.name, weights)

    leaves, masks, codes = round_sites(params, grams, strength, pattern, options, prunable, sites)
    return Quantized(flat.build(leaves), flat.build(masks), codes)


def _checked(bits: int, symmetric: bool, group_size: int | None, damping: float, block: int, title: str) -> Options:
    check_damping(damping, title)
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2):
        raise ValueError(
            f"{title} takes group_size, a whole number of inputs of at least 2, or None; got {group_size!r}."
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{title} takes a whole number of inputs, block >= 1; got {block!r}.")
    return Options(title, read_grid(bits, symmetric, title), group_size, damping, block)
