"""Masks from parameters, parameters under masks, and how much is gone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import rules
from jaxprune._selection import _counts
from jaxprune._tree._axes import Stacked
from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_complex, is_floating, is_known, own
from jaxprune._tree._masks import align_masks, all_true, check_mask, kept
from jaxprune._tree._params import Params, read_params
from jaxprune._tree._paths import flatten, read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.rules._layers import Layer, is_scalar
from jaxprune.rules._rule import AnyRule, Rule, as_rule
from jaxprune.scores._evidence import require_scores
from jaxprune.sites._sites import Sites


def make_masks(
    params: Any,
    k: Any,
    *,
    rule: AnyRule = rules.std_threshold,
    scores: Any = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> Any:
    """Say which weights stay: a tree of boolean masks shaped like `params`, True = keep.

    By default a weight stays whose magnitude is at least k standard deviations of its layer. No layer is emptied, a
    leaf that is not prunable is kept whole, the result depends on nothing but the arguments. Works under ``jit``,
    under ``vmap`` over k, inside ``lax.scan``, on sharded arrays (masks are sharded like the parameters), and on any
    pytree: a Linen dict or FrozenDict, an ``nnx.State``, an Equinox module filtered to its arrays, a Haiku dict.
    Inside ``shard_map`` every rule takes the local shard for the whole layer (for N:M along an axis that is not
    sharded it is the same); for global thresholds and counts call it outside, on the sharded arrays.

    Args:
        params: a pytree of arrays of any shape. Complex weights are ranked by their modulus; leaves that are not
            floating-point are kept whole.
        k: the rule's strength: a number, a scalar array (may be traced), or a tree prefix of `params`, one k for each
            layer or subtree. For the default rule k >= 0.
        rule: ``(scores, k) -> masks``, one of `jaxprune.rules` or your own: it is given a tree of float32 scores that
            has None where a leaf is not prunable, and returns a tree of boolean masks of the same shapes.
        scores: a tree of scores like `params`, larger = keep; None ranks by magnitude.
        prunable: which leaves are pruned: ``(path, leaf) -> bool``, glob patterns of paths or of modules above the leaf, a
            tree (prefix) of bools, or `sites`; None prunes what the sites say, or else what `is_kernel` names. Static.
        stacked: which leaves hold one layer for each index of their first axis (by ``nn.scan`` or ``vmap``): glob patterns
            of paths or of modules above the leaf, ``(path, leaf) -> number of layer axes``, or a tree (prefix) of such
            numbers. Every statistic, threshold, count and guard is then per layer. Static.
        sites: what `find_sites` read from the function: which leaves multiply data, along which axes, in which stacks;
            then nothing is guessed from names. Static.

    Returns:
        Masks of the treedef of `params`, of its shapes, ``bool``.

    Raises:
        ValueError: nothing is prunable, or k, scores or a pattern does not fit; the message names the leaf.
        TypeError: a leaf is no array, k is no number, rule is no rule, or scores are no tree.

    Warns:
        PruningWarning: outside jit, when a layer would have been emptied.
        UserWarning: by default, when leaves have no names to go by, as in a list, or are the state of an optimizer.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.array([[3.0, -1.0], [1.0, -3.0]]), "bias": jnp.zeros(2)}}
    >>> masks = make_masks(params, 1.0)  # std = sqrt(5)
    >>> masks["dense"]["kernel"].tolist(), masks["dense"]["bias"].tolist()
    ([[True, False], [False, True]], [True, True])

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015.
    """
    rule = as_rule(rule)
    tree = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    layers = _layers(tree, scores)
    if not is_scalar(k):
        k = tree.build(
            [entry if fits else None for entry, fits in zip(tree.spread(k, "k"), tree.prunable, strict=True)]
        )
    pruned = iter(_read_masks(rule(tree.build(layers), k), layers, rule))
    return tree.build(
        [next(pruned) if fits else all_true(leaf) for leaf, fits in zip(tree.leaves, tree.prunable, strict=True)]
    )


def _layers(tree: Params, scores: Any) -> list[Layer | None]:
    """Pair every prunable leaf with its scores; None for the others."""
    given = [None] * len(tree.paths) if scores is None else _given_scores(tree, scores)
    return [
        Layer(path, name, jnp.asarray(leaf if score is None else score), axes, scores is None) if fits else None
        for path, name, leaf, score, fits, axes in zip(
            tree.paths, tree.names, tree.leaves, given, tree.prunable, tree.axes, strict=True
        )
    ]


def _given_scores(tree: Params, scores: Any) -> list[Any]:
    require_scores(scores)
    given = tree.aligned(flatten(scores, "scores", is_leaf=lambda x: x is None))
    for name, leaf, score, fits in zip(tree.names, tree.leaves, given, tree.prunable, strict=True):
        if not fits:
            continue
        if score is None or not is_floating(score) or is_complex(score) or np.shape(score) != np.shape(leaf):
            found = "None" if score is None else f"{jnp.asarray(score).dtype}{list(np.shape(score))}"
            raise ValueError(
                f"scores for {name} are {found}, not real floating-point numbers of its shape {list(np.shape(leaf))}."
            )
        if is_known(score) and _has_nan(score):
            raise ValueError(f"scores for {name} hold NaN; a score says how much a weight matters (-inf: not at all).")
    return given


def _has_nan(score: Any) -> bool:
    # Scores that a traced function closes over are known, but what is computed of them there is not.
    with jax.ensure_compile_time_eval():
        return bool(jnp.isnan(score).any())


def _read_masks(masks: Any, layers: list[Layer | None], rule: Rule) -> list[jax.Array]:
    """Check what a rule returned; one mask for each layer, in order."""
    leaves = jax.tree.leaves(masks)
    expected = [layer for layer in layers if layer is not None]
    if len(leaves) != len(expected):
        raise ValueError(f"rule {rule.name} returned {len(leaves)} masks for {len(expected)} prunable leaves.")
    for mask, layer in zip(leaves, expected, strict=True):
        check_mask(mask, f"rule {rule.name} returned for {layer.name} a mask", layer.values)
    return leaves


def require_make(make: Any, call: str) -> None:
    """Raise a TypeError where ``make: (params, k) -> masks`` is no function, or a rule, which takes scores."""
    rule = getattr(make, "func", make)
    if isinstance(rule, Rule):
        raise TypeError(
            f"{call} was given {rule.name} for make, a rule, which takes scores and not parameters. Write "
            f"make = functools.partial(make_masks, rule={rule.name})."
        )
    if not callable(make):
        raise TypeError(
            f"{call} was given {described(make)} for make, which is a function (params, k) -> masks. Write "
            "make = functools.partial(make_masks, rule=rules.global_sparsity)."
        )


def apply_masks(params: Any, masks: Any) -> Any:
    """Set to zero what the masks do not keep: ``where(mask, param, 0)``.

    Pruned weights become exactly ``+0.0`` (complex ones ``0+0j``), whatever they were (NaN and infinity included); kept ones are untouched, bit
    for bit (but for a NaN's payload); dtypes, treedef and sharding are those of `params`. Differentiable: the gradient
    of a pruned weight is zero. Besides pruning once, this in the forward pass is the form that holds in any optimizer.

    Args:
        params: a pytree of arrays; leaves that are not floating-point stay as they are.
        masks: a tree with the same paths, of boolean arrays of the same shapes, True = keep; its containers may be of
            other classes (a FrozenDict's masks fit a dict). A leaf that is None keeps the parameter whole. Of ``variables``
            with a collection ``params`` and of ``params`` alone, each fits the other.

    Returns:
        The parameters, of the treedef of `params`; all arrays are new, so that either tree may be donated.

    Raises:
        ValueError: a mask is missing, is not bool, or has another shape; the message names the leaf.

    >>> import jax.numpy as jnp
    >>> apply_masks([jnp.array([1.0, jnp.nan])], [jnp.array([True, False])])[0].tolist()
    [1.0, 0.0]
    """
    tree = read_arrays(params, "params")
    return tree.build(
        [
            own(leaf) if mask is None or not is_floating(leaf) else kept(leaf, mask)
            for leaf, mask in zip(tree.leaves, align_masks(masks, tree), strict=True)
        ]
    )


def sparsity(
    masks: Any, *, prunable: Prunable = None, stacked: Stacked = None, sites: Sites | None = None
) -> jax.Array:
    """Return the fraction removed of the prunable weights, ``1 - nnz / size``.

    Args:
        masks: a tree of boolean masks, True = keep.
        prunable: which leaves count, as in `make_masks`; ``lambda path, leaf: True`` gives the overall sparsity.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        A float32 scalar in [0, 1].

    >>> import jax.numpy as jnp
    >>> masks = {"kernel": jnp.array([[True, False], [False, False]]), "bias": jnp.ones(4, bool)}
    >>> float(sparsity(masks)), float(sparsity(masks, prunable=lambda path, leaf: True))
    (0.75, 0.375)
    """
    for name, leaf in flatten(masks, "masks").named():
        if getattr(leaf, "dtype", None) != np.bool_:
            raise TypeError(f"{name} is {leaf!r:.40}, not an array of bool; sparsity counts masks.")
    tree = read_params(masks, what="masks", prunable=prunable, stacked=stacked, sites=sites, eligible=lambda leaf: True)
    leaves = [leaf for leaf, fits in zip(tree.leaves, tree.prunable, strict=True) if fits]
    removed = sum(
        (_counts.to_float(_counts.count_true(~jnp.asarray(leaf), tuple(range(leaf.ndim)))) for leaf in leaves),
        jnp.zeros((), jnp.float32),
    )
    return removed / max(1, sum(leaf.size for leaf in leaves))
