"""Masks and thresholds in the forward pass: what the loss sees in place of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._layers import is_scalar
from jaxprune._masks import align_masks, apply_masks
from jaxprune._paths import flatten, is_floating, spread
from jaxprune._prunable import Predicate, Stacked, choose, stack_axes
from jaxprune._transforms import require_params


def straight_through(params: Any, masks: Any, backward: Any = None) -> Any:
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
    ...     return jnp.sum(5 * straight_through(p, make_masks(p, 2.0), make_masks(p, 1.0))["kernel"])
    >>> params = {"kernel": jnp.array([[6.0, 2.0, 1.0, 1.0, 2.0, 0.0]])}
    >>> jax.grad(loss)(params)["kernel"].tolist()
    [[5.0, 5.0, 0.0, 0.0, 5.0, 0.0]]

    Reference: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013;
    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, section 2.1.
    """
    flat = flatten(params, "params")
    forward = align_masks(masks, flat)
    through = [None] * len(forward) if backward is None else align_masks(backward, flat)

    return flat.treedef.unflatten(
        [
            leaf if mask is None or not is_floating(leaf) else _straight_through(leaf, mask, receives)
            for leaf, mask, receives in zip(flat.leaves, forward, through, strict=True)
        ]
    )


@jax.custom_jvp
def _straight_through(leaf: jax.Array, mask: jax.Array, receives: jax.Array | None) -> jax.Array:
    del receives
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    receives, tangent = primals[2], tangents[0]
    passed = tangent if receives is None else jnp.where(receives, tangent, jnp.zeros_like(tangent))
    return _straight_through(*primals), passed


def decay_pruned(make: Callable[[Any], Any], rate: float) -> optax.GradientTransformationExtraArgs:
    """Pull the weights that masks prune towards zero: the sparse-refined part of SR-STE.

    Adds ``rate * param`` to the gradient wherever the mask is False. Together with `straight_through` in the loss,
    under masks made the same way, this is SR-STE: it steadies which weights of an N:M group are kept.

    Placement: first in the chain, before the optimizer, as weight decay that is part of the gradient.

    Args:
        make: ``params -> masks``, the function that also makes the forward masks.
        rate: the decay, >= 0 (the paper's lambda, 2e-4 there).

    Returns:
        A transform with an empty state.

    Raises:
        ValueError: rate < 0; by ``update`` without params.

    >>> import jax.numpy as jnp, optax
    >>> tx = decay_pruned(lambda params: [jnp.array([True, False])], 0.5)
    >>> tx.update([jnp.zeros(2)], tx.init(None), [jnp.array([3.0, 2.0])])[0][0].tolist()
    [0.0, 1.0]

    Reference: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, eq. 8.
    """
    if isinstance(rate, int | float) and rate < 0:
        raise ValueError(f"decay_pruned takes rate >= 0; got {rate}.")

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any, state: optax.EmptyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        require_params(params, "decay_pruned")
        flat = flatten(updates, "updates")
        pruned = flatten(params, "params")
        masks = dict(zip(pruned.paths, zip(pruned.leaves, align_masks(make(params), pruned), strict=True), strict=True))

        def add(update: Any, param: Any, mask: Any) -> Any:
            if mask is None or not is_floating(param):
                return update
            return update + jnp.where(mask, jnp.zeros_like(param), rate * param).astype(update.dtype)

        return flat.treedef.unflatten(
            [add(leaf, *masks[path]) for leaf, path in zip(flat.leaves, flat.paths, strict=True)]
        ), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def soft_threshold(
    params: Any, thresholds: Any, *, prunable: Predicate | Any = None, stacked: Stacked | None = None
) -> Any:
    """Shrink every prunable weight by its layer's learnt threshold: ``sign(w) * relu(|w| - sigmoid(s))`` (STR).

    Train `params` and `thresholds` together, with weight decay on both; the sparsity that results is the optimizer's
    choice. At the end the value is the pruned network: its zeros are exactly ``+0.0``, also where a weight is NaN.

    Args:
        params: a pytree of arrays.
        thresholds: s, one number or scalar array, or a tree prefix of `params` of these; an entry for stacked layers
            may have the shape of the stack.
        prunable: which leaves are shrunk, as in `make_masks`.
        stacked: as in `make_masks`.

    Returns:
        The parameters as the forward pass is to see them, of the treedef of `params`.

    Raises:
        ValueError: a prunable leaf has no threshold, or one of another shape; the message names it.

    >>> import jax.numpy as jnp
    >>> soft_threshold({"kernel": jnp.array([[2.0, -0.25]])}, 0.0)["kernel"].tolist()  # sigmoid(0) = 0.5
    [[1.5, 0.0]]

    Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020, eq. 3.
    """
    flat = flatten(params, "params")
    stacks = stack_axes(stacked, flat)
    chosen = choose(prunable, params, flat, stacks)
    alone = is_scalar(thresholds)
    given = [thresholds] * len(flat.paths) if alone else spread(thresholds, flat.paths, "thresholds")
    return flat.treedef.unflatten(
        [
            _shrink(leaf, s, name, stack) if fits else leaf
            for name, leaf, s, fits, stack in zip(flat.names, flat.leaves, given, chosen, stacks, strict=True)
        ]
    )


def _shrink(weight: jax.Array, s: Any, name: str, stack: int) -> jax.Array:
    if s is None:
        raise ValueError(f"thresholds has no entry for {name}; it must cover every prunable leaf.")
    shape = jnp.shape(s)
    if shape not in ((), weight.shape[:stack]):
        raise ValueError(
            f"the threshold for {name} has shape {list(shape)}; it must be a scalar"
            + (f" or of shape {list(weight.shape[:stack])}, one for each stacked layer." if stack else ".")
        )
    threshold = jax.nn.sigmoid(jnp.reshape(jnp.asarray(s, weight.dtype), shape + (1,) * (weight.ndim - len(shape))))
    size = jnp.abs(weight)
    return jnp.where(size > threshold, jnp.sign(weight) * (size - threshold), jnp.zeros_like(weight))


def merge_lora(kernel: jax.Array, a: jax.Array, b: jax.Array, mask: jax.Array, *, scale: float = 1.0) -> jax.Array:
    """Merge a low-rank adapter into a pruned kernel and keep its zeros: ``where(mask, w + scale * a b, 0)``.

    The product of an adapter is dense; merged without the mask it would fill the pruned weights.

    Args:
        kernel: [in, out].
        a: [in, rank].
        b: [rank, out].
        mask: bool [in, out], True = keep.
        scale: the adapter's factor, alpha / rank.

    Returns:
        The merged kernel, [in, out], of the kernel's dtype.

    Raises:
        ValueError: shapes do not fit, or the mask is not bool.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, False]])
    >>> merge_lora(jnp.array([[1.0, 0.0]]), jnp.array([[2.0]]), jnp.array([[3.0, 4.0]]), mask).tolist()
    [[7.0, 0.0]]
    """
    if a.shape[1:] != b.shape[:1] or (a.shape[0], b.shape[1]) != kernel.shape:
        raise ValueError(f"an adapter of shapes {a.shape} and {b.shape} does not fit a kernel of shape {kernel.shape}.")
    merged: jax.Array = apply_masks(kernel + (scale * (a @ b)).astype(kernel.dtype), mask)
    return merged
