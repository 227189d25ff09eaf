"""A gate for each weight: it stays with a probability that is learnt."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._axes import Stacked
from jaxprune._tree._masks import align_masks
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Prunable
from jaxprune._tree._sharding import sharded_as, without_explicit_axes
from jaxprune.learned._noise import Course, check_prior, key_of, value_at
from jaxprune.learned._soft import read_gates
from jaxprune.sites._sites import Sites


def weight_gates(
    params: Any,
    key: jax.Array,
    *,
    prior: Any = None,
    std: float = 0.014,
    strength: float = 3.0,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> Any:
    """Make a gate for each weight, to be learnt while the weights stay as they are: large where a weight is to stay.

    Gates are normal numbers of the deviation `std`; where the `prior` keeps a weight ``strength * std`` is added, where it
    prunes one, it is taken off. They are float32 whatever the dtype of `params`, as the numbers they become differ by
    hundredths. When they have learnt, ``make_masks(params, k, scores=gates, rule=...)`` gives masks of exact counts.

    Args:
        params: a pytree of arrays; only shapes, names and sharding matter.
        key: a PRNG key. A leaf's gates depend on it and on the leaf's path.
        prior: masks to begin with, True = keep, from any one-shot method, near the sparsity that is wanted; None begins
            with none, and so does a leaf for which it has None.
        std: the deviation, > 0.
        strength: how many deviations the prior is worth, >= 0.
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        A tree like `params`, float32, sharded as `params`, with None for each leaf that is not pruned: any optimizer takes
        it, and keeps nothing for the weights.

    Raises:
        ValueError: nothing is prunable; masks of other paths, shapes or dtype; std or strength is out of range.

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.ones(2)}
    >>> prior = {"kernel": jnp.array([[True, False], [False, True]]), "bias": None}
    >>> gates = weight_gates(params, jax.random.key(0), prior=prior, std=0.01, strength=10.0)  # 0.1 and -0.1, about
    >>> gates["bias"], gates["kernel"].dtype, (gates["kernel"] > 0).tolist()
    (None, dtype('float32'), [[True, False], [False, True]])

    Reference: LEAP, arXiv 2605.17289, 2026: the gates that PATCH gives to tiles, one for each weight. Deviation and strength are
    those of the published code.
    """
    check_prior(std, strength, "weight_gates")
    tree = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    priors = [None] * len(tree.leaves) if prior is None else align_masks(prior, tree)

    def make(leaf: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
        def draw(like: jax.Array, key: jax.Array) -> jax.Array:
            return sharded_as(std * jax.random.normal(key, like.shape, jnp.float32), like)

        gates = without_explicit_axes(draw, leaf)(leaf, key)
        return gates if mask is None else gates + jnp.where(mask, strength * std, -strength * std).astype(jnp.float32)

    return tree.build(
        [
            make(jnp.asarray(leaf), key_of(key, path), mask) if fits else None
            for path, leaf, mask, fits in zip(tree.paths, tree.leaves, priors, tree.prunable, strict=True)
        ]
    )


def soft_masks(
    gates: Any,
    key: jax.Array,
    step: Any,
    *,
    steps: int,
    temperature: Course = (4.0, 0.05),
    scale: Course = (25.0, 350.0),
) -> Any:
    """Draw soft masks: ``sigmoid((scale * gate + noise) / temperature)``, the noise logistic.

    Differentiable in the gates. As the scale rises and the temperature falls they become hard: in the limit a weight stays with the
    probability ``sigmoid(scale * gate)``. The noise depends on the key, the step and the leaf's path alone, so
    that a resumed run draws what the run would have drawn.

    Args:
        gates: from `weight_gates`.
        key: a PRNG key, the same for all steps.
        step: the number of the step, from 0 on; may be traced.
        steps: how many there will be (static). Behind the last one, temperature and scale stay as they are.
        temperature: a pair (at the first step, at the last one), linear in between, or a schedule of the step as optax has them.
        scale: likewise.

    Returns:
        A tree like `gates`, float32 in [0, 1].

    Raises:
        ValueError: steps < 1, a pair that is none of positive numbers, or gates that hold no gate.
        TypeError: a leaf of gates is not of real floating-point numbers.

    >>> import jax, jax.numpy as jnp
    >>> gates = {"kernel": jnp.array([[0.5, -0.5]]), "bias": None}
    >>> soft_masks(gates, jax.random.key(0), 2000, steps=2000)["kernel"].round(3).tolist()  # 350 * 0.5 / 0.05
    [[1.0, 0.0]]

    Reference: as `weight_gates`; the defaults are those of the published code. The noise: Maddison, Mnih, Teh, "The Concrete
    Distribution", 2017.
    """
    tree = read_gates(gates)
    hotness = value_at(temperature, step, steps, "temperature")
    size = value_at(scale, step, steps, "scale")
    now = jax.random.fold_in(key, step)

    def soften(gate: jax.Array, key: jax.Array) -> jax.Array:
        def draw(like: jax.Array, key: jax.Array) -> jax.Array:
            return jax.random.logistic(key, like.shape, like.dtype)

        noise = without_explicit_axes(draw, gate)(gate, key)
        return jax.nn.sigmoid((size * gate + noise) / hotness)

    return tree.build([soften(leaf, key_of(now, path)) for path, leaf in zip(tree.paths, tree.leaves, strict=True)])
