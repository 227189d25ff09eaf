"""Masks in the forward pass that let gradients through."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating, own
from jaxprune._tree._masks import align_masks, kept
from jaxprune._tree._paths import flatten


def straight_through(params: Any, masks: Any, *, backward: Any = None) -> Any:
    """Apply masks in the forward pass, and let the gradient through to pruned weights as well.

    The value is `apply_masks` of the parameters; the gradient is that of the identity, or of the `backward` masks:
    those of Top-KAST, a superset of the forward ones. The parameters stay dense, so a weight may come back as soon as
    the masks, made anew from them in every step, say so. At the end prune them with `apply_masks`.

    Args:
        params: a pytree of arrays.
        masks: masks for the forward pass, True = keep.
        backward: masks for the gradient, True = receives a gradient; None lets every gradient through.

    Returns:
        The parameters as the forward pass is to see them, of the treedef of `params`.

    Raises:
        ValueError: masks of other paths, shapes or dtype; the message names the leaf.

    >>> import jax, jax.numpy as jnp
    >>> masks = [jnp.array([True, False])]
    >>> jax.grad(lambda p: jnp.sum(straight_through(p, masks)[0] ** 2))([jnp.array([3.0, 2.0])])[0].tolist()
    [6.0, 0.0]
    >>> jax.grad(lambda p: jnp.sum(5 * straight_through(p, masks)[0]))([jnp.array([3.0, 2.0])])[0].tolist()
    [5.0, 5.0]

    Top-KAST makes both masks anew in the loss; a weight that only `backward` keeps is trained, but not used yet.

    >>> from jaxprune import make_masks
    >>> def loss(p):  # std = 1.9
    ...     return jnp.sum(5 * straight_through(p, make_masks(p, 2.0), backward=make_masks(p, 1.0))["kernel"])
    >>> params = {"kernel": jnp.array([[6.0, 2.0, 1.0, 1.0, 2.0, 0.0]])}
    >>> jax.grad(loss)(params)["kernel"].tolist()
    [[5.0, 5.0, 0.0, 0.0, 5.0, 0.0]]

    Reference: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013;
    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, section 2.1.
    """
    flat = flatten(params, "params")
    forward = align_masks(masks, flat)
    through = [None] * len(forward) if backward is None else align_masks(backward, flat)

    return flat.build(
        [
            own(leaf) if mask is None or not is_floating(leaf) else _straight_through(leaf, mask, receives)
            for leaf, mask, receives in zip(flat.leaves, forward, through, strict=True)
        ]
    )


@jax.custom_jvp
def _straight_through(leaf: jax.Array, mask: jax.Array, receives: jax.Array | None) -> jax.Array:
    del receives
    return kept(leaf, mask)


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    receives, tangent = primals[2], tangents[0]
    passed = tangent if receives is None else jnp.where(receives, tangent, jnp.zeros_like(tangent))
    return _straight_through(*primals), passed
