"""A gate for each pattern of a group of N:M weights: the group has one of them, with probabilities that are learnt."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._axes import Stacked
from jaxprune._tree._masks import align_masks, all_true
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import Tree
from jaxprune._tree._prunable import Prunable
from jaxprune._tree._sharding import sharded_as, without_explicit_axes
from jaxprune.learned._noise import Course, check_prior, key_of, value_at
from jaxprune.learned._soft import beside
from jaxprune.rules._layers import Layer
from jaxprune.sites._sites import Sites


def pattern_gates(
    params: Any,
    k: int,
    m: int,
    key: jax.Array,
    *,
    prior: Any = None,
    std: float = 0.01,
    strength: float = 3.0,
    axis: int | None = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> Any:
    """Make a gate for each pattern that keeps k of m weights, of each group along the inputs, to be learnt.

    Groups are those of ``rules.n_m(m, axis=axis)``. Gates are normal numbers of the deviation `std`, float32; the `prior` adds
    ``strength * std`` for each weight that a pattern keeps with it, less what patterns have on average. A group of 2:4 has 6
    gates, one of 4:8 has 70; for longer groups `weight_gates` are cheaper.

    Args:
        params: a pytree of arrays; only shapes, names and sharding matter.
        k: how many weights of a group stay, 1 <= k < m.
        m: the size of a group.
        key: a PRNG key. A leaf's gates depend on it and on the leaf's path.
        prior: as in `weight_gates`.
        std: the deviation, > 0.
        strength: how many deviations one weight that is kept with the prior is worth, >= 0.
        axis: as in `rules.n_m`.
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`, for the axis of the inputs, too.

    Returns:
        A tree like `params` with None for each leaf that is not pruned, float32. A leaf ``[..., inputs, ...]`` has gates
        ``[..., inputs / m, ..., patterns]``, the patterns in the order of `itertools.combinations` of what they keep.

    Raises:
        ValueError: k or m is out of range, the inputs do not divide into groups, or nothing tells which axis they are; and as
            `weight_gates`.

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    >>> pattern_gates(params, 2, 4, jax.random.key(0))["kernel"].shape
    (2, 3, 6)

    Reference: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", 2024; deviation and
    strength are those of its scripts.
    """
    check_prior(std, strength, "pattern_gates")
    for number in (k, m):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"pattern_gates keeps k of every m weights, whole numbers; got k = {k!r}, m = {m!r}.")
    if not 1 <= k < m:
        raise ValueError(f"pattern_gates keeps k of every m weights, 1 <= k < m; got k = {k}, m = {m}.")
    tree = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    priors = [None] * len(tree.leaves) if prior is None else align_masks(prior, tree)
    patterns = _patterns(k, m).astype(np.float32)

    def make(layer: Layer, key: jax.Array, mask: jax.Array | None) -> jax.Array:
        leaf, along = layer.values, layer.input_axis("learned.pattern_gates", axis)
        if leaf.shape[along] % m:
            raise ValueError(
                f"pattern_gates groups weights by {m} along axis {along - leaf.ndim}, but {layer.name} has shape {leaf.shape}. "
                "Choose another axis, or leave this parameter dense with prunable=..."
            )
        shape = (*leaf.shape[:along], leaf.shape[along] // m, *leaf.shape[along + 1 :], len(patterns))

        def draw(leaf: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
            first = _grouped(leaf, along, m)[..., :1]
            gates = sharded_as(std * jax.random.normal(key, shape, jnp.float32), jnp.broadcast_to(first, shape))
            if mask is None:
                return gates
            overlap = _grouped(mask, along, m).astype(jnp.float32) @ patterns.T
            return gates + strength * std * (overlap - k * k / m)

        return without_explicit_axes(draw, leaf, shape)(leaf, key, mask)

    return tree.build(
        [
            make(Layer(path, name, jnp.asarray(leaf), roles), key_of(key, path), mask) if fits else None
            for path, name, leaf, roles, mask, fits in zip(
                tree.paths, tree.names, tree.leaves, tree.axes, priors, tree.prunable, strict=True
            )
        ]
    )


def soft_patterns(
    gates: Any,
    params: Any,
    k: int,
    key: jax.Array,
    step: Any,
    *,
    steps: int,
    temperature: Course = (4.0, 0.05),
    scale: Course = (100.0, 500.0),
) -> Any:
    """Draw soft masks of k:m: each group's patterns, weighted by ``softmax((scale * gates + noise) / temperature)``, noise of Gumbel.

    Differentiable in the gates. The mask's numbers sum to k in every group. The noise depends on the key, the step and the
    leaf's path alone, as in `soft_masks`.

    Args:
        gates: from `pattern_gates`.
        params: the parameters, for their shapes.
        k: as in `pattern_gates`.
        key: as in `soft_masks`.
        step: as in `soft_masks`.
        steps: as in `soft_masks`.
        temperature: as in `soft_masks`.
        scale: as in `soft_masks`.

    Returns:
        A tree like `params`, float32 in [0, 1], with None where `gates` have None.

    Raises:
        ValueError: gates do not belong to these parameters and this k; and as `soft_masks`.
        TypeError: a leaf of gates is not of real floating-point numbers.

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((4, 1))}
    >>> gates = {"kernel": jnp.array([[[0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]])}  # the fourth pattern keeps 1 and 2
    >>> soft_patterns(gates, params, 2, jax.random.key(0), 2000, steps=2000)["kernel"].ravel().tolist()
    [0.0, 1.0, 1.0, 0.0]

    Reference: as `pattern_gates`; the defaults are those of its scripts.
    """
    hotness = value_at(temperature, step, steps, "temperature")
    size = value_at(scale, step, steps, "scale")
    now = jax.random.fold_in(key, step)

    def soften(group: _Groups) -> jax.Array:
        def mix(gate: jax.Array, leaf: jax.Array, key: jax.Array, size: jax.Array, hotness: jax.Array) -> jax.Array:
            noise = jax.random.gumbel(key, gate.shape, gate.dtype)
            shares = jax.nn.softmax((size * gate + noise) / hotness, -1)
            mixed = jnp.matmul(shares, group.patterns.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
            return sharded_as(_ungrouped(mixed, group.axis), leaf)

        key = key_of(now, group.path)
        return without_explicit_axes(mix, group.leaf)(group.gate, group.leaf, key, size, hotness)

    tree, found = _read(gates, params, k)
    return tree.build([None if group is None else soften(group) for group in found])


def pattern_masks(gates: Any, params: Any, k: int) -> Any:
    """Return each group's best pattern: masks that keep exactly k of every m weights.

    Among equals the first pattern is kept; NaN ranks lowest.

    Args:
        gates: from `pattern_gates`.
        params: the parameters.
        k: as in `pattern_gates`.

    Returns:
        Masks of the treedef and shapes of `params`, ``bool``, True = keep; a leaf without gates is kept whole.

    Raises:
        ValueError: gates do not belong to these parameters and this k.
        TypeError: a leaf of gates is not of real floating-point numbers.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((4, 1)), "bias": jnp.ones(1)}
    >>> gates = {"kernel": jnp.array([[[0.0, 0.2, 0.0, 0.1, 0.0, 0.0]]]), "bias": None}  # the second one keeps 0 and 2
    >>> pattern_masks(gates, params, 2)["kernel"].ravel().tolist()
    [True, False, True, False]
    """

    def choose(group: _Groups) -> jax.Array:
        def best(gate: jax.Array, leaf: jax.Array) -> jax.Array:
            number = jnp.argmax(jnp.where(jnp.isnan(gate), -jnp.inf, gate), -1)
            return sharded_as(_ungrouped(jnp.asarray(group.patterns)[number], group.axis), leaf)

        return without_explicit_axes(best, group.leaf)(group.gate, group.leaf)

    tree, found = _read(gates, params, k)
    return tree.build(
        [all_true(leaf) if group is None else choose(group) for leaf, group in zip(tree.leaves, found, strict=True)]
    )


class _Groups(NamedTuple):
    """A leaf whose groups have gates, and along which axis they run."""

    path: str
    leaf: jax.Array
    gate: jax.Array
    axis: int
    patterns: np.ndarray


def _read(gates: Any, params: Any, k: int) -> tuple[Tree, list[_Groups | None]]:
    """Read parameters with their gates, and find in the shapes of both how long groups are, and where."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"Patterns keep k of every m weights, a whole number >= 1; got k = {k!r}.")
    tree, found = beside(params, gates)
    groups: list[_Groups | None] = []
    for path, name, leaf, gate in zip(tree.paths, tree.names, tree.leaves, found, strict=True):
        if gate is None:
            groups.append(None)
            continue
        shape, (*own, count) = np.shape(leaf), np.shape(gate) or (0,)
        axes = [axis for axis in range(len(shape)) if len(own) == len(shape) and own[axis] != shape[axis]]
        m = shape[axes[0]] // max(1, own[axes[0]]) if len(axes) == 1 else 0
        if not m or own[axes[0]] * m != shape[axes[0]] or math.comb(m, k) != count:
            raise ValueError(
                f"gates has for {name} an array of shape {np.shape(gate)}, which are no gates of patterns that keep {k} weights of "
                f"a group, for a leaf of shape {shape}. Make them by learned.pattern_gates from these parameters, with this k."
            )
        groups.append(_Groups(path, jnp.asarray(leaf), gate, axes[0], _patterns(k, m)))
    return tree, groups


def _patterns(k: int, m: int) -> np.ndarray:
    """All ways to keep k of m, bool [patterns, m]."""
    kept = np.array(list(itertools.combinations(range(m), k)))
    return (kept[..., None] == np.arange(m)).any(1)


def _grouped(values: jax.Array, axis: int, m: int) -> jax.Array:
    """Return [..., axis / m, ..., m]."""
    shape = values.shape
    return jnp.moveaxis(values.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :]), axis + 1, -1)


def _ungrouped(values: jax.Array, axis: int) -> jax.Array:
    """Turn [..., axis / m, ..., m] back."""
    *shape, m = values.shape
    return jnp.moveaxis(values, -1, axis + 1).reshape(*shape[:axis], shape[axis] * m, *shape[axis + 1 :])
