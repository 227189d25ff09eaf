"""Some steps of training under fixed masks, right after a one-shot method."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._masks import apply_masks
from jaxprune._progress import tracked
from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_floating, own
from jaxprune._tree._paths import read_arrays
from jaxprune.transforms._sparse_training import static_sparse

# Of the steps whose losses are compared, at the beginning and at the end, the share.
_COMPARED = 10


class Healed(NamedTuple):
    """What `heal` returns.

    Attributes:
        params: trained, pruned weights exactly ``+0.0``.
        losses: of each batch before its step, float32 ``[steps]``.
    """

    params: Any
    losses: np.ndarray

    def __repr__(self) -> str:
        """Return how many steps there were and the first and the last loss; the arrays would fill screens."""
        return f"<Healed: {len(self.losses):,} steps, loss {self.losses[0]:.4g} to {self.losses[-1]:.4g}>"


def heal(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    masks: Any,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    *,
    progress: bool = False,
) -> Healed:
    """Train for a few steps under fixed masks: one step for each batch, right after a one-shot method.

    Pruned weights are exactly ``+0.0`` before the first step, whatever they were, and after the last; the optimizer never
    sees their gradients, so that its moments and clipping know kept weights alone (`static_sparse`). The parameters given
    stay as they are. Steps are compiled once where batches have one shape. To save a long run on its way, write the
    loop yourself, with `static_sparse` in it.

    Args:
        loss: ``(params, batch) -> a number``: the training loss, or a distance to the network as it was before pruning
            (`jaxprune.distill.logit_loss`). Jitted here.
        params: a pytree of floating-point arrays, pruned or not.
        masks: boolean masks of the same paths, True = keep.
        batches: trees of arrays, any iterable, a generator too; as many as steps are wanted, at least one.
        optimizer: any of optax, with a schedule of its own that ends where the batches end; it may read the loss as ``value``.
        progress: show a bar on stderr.

    Returns:
        A `Healed`: the parameters, and the losses.

    Raises:
        ValueError: no batch; a loss that is NaN or infinite (the message says of which batch); masks that do not fit.
        TypeError: the loss is no single number, a leaf is not floating-point, or `optimizer` is none.

    Warns:
        UserWarning: the mean loss of the last tenth of the batches is above that of the first by more than batches differ: a
            learning rate too high.

    >>> import jax.numpy as jnp, optax
    >>> params, masks = {"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([True, False])}
    >>> found = heal(lambda p, x: (p["w"].sum() - x) ** 2, params, masks, [jnp.array(5.0)] * 2, optax.sgd(0.25))
    >>> found.params["w"].tolist(), found.losses.tolist()
    ([4.0, 0.0], [16.0, 4.0])
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"heal was given {described(optimizer)} where the optimizer belongs, any of optax: optax.adam(1e-3)."
        )
    for name, leaf in read_arrays(params, "params").named():
        if not is_floating(leaf):
            raise TypeError(
                f"{name} is {jnp.result_type(leaf)}: give heal what is trained, and let the loss close over the rest."
            )
    tx = static_sparse(optimizer, masks)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(_single(loss))(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    params = apply_masks(params, masks)
    # A copy, since a state may hold the parameters themselves, and what is donated must be there once.
    state = jax.tree.map(own, tx.init(params))
    losses: list[jax.Array] = []
    for batch in tracked(batches, "healing", progress):
        params, state, value = step(params, state, batch)
        # Of the step before: the device has work while this one is read.
        _require_finite(losses)
        losses.append(value)
    if not losses:
        raise ValueError("heal needs at least one batch, since it takes a step for each; the iterable was empty.")
    _require_finite(losses)
    found = np.asarray(jax.device_get(losses), np.float32)
    _caution(found)
    return Healed(params, found)


def _single(loss: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """Return the loss, which raises a TypeError where it gives something else than one number."""

    def checked(params: Any, batch: Any) -> jax.Array:
        value = loss(params, batch)
        if not isinstance(value, jax.Array | float) or jnp.shape(value):
            found = f"an array of shape {list(value.shape)}" if isinstance(value, jax.Array) else described(value)
            raise TypeError(f"loss(params, batch) gave heal {found}; it is to be one number, the mean over the batch.")
        return jnp.asarray(value)

    return checked


def _require_finite(losses: list[jax.Array]) -> None:
    if losses and not np.isfinite(losses[-1]):
        raise ValueError(
            f"the loss of batch {len(losses) - 1} is {float(losses[-1])}. Take a smaller learning rate, with a warm-up, or look at "
            "that batch; the parameters given are as they were."
        )


def _caution(losses: np.ndarray) -> None:
    if len(losses) < 3:  # nobody knows how much batches differ
        return
    share = max(1, len(losses) // _COMPARED)
    first, last = losses[:share].mean(), losses[-share:].mean()
    # Batches differ: what neighbours differ by is no rise. Two standard errors of the difference of two such means.
    noise = np.std(np.diff(losses)) / np.sqrt(2)
    if last - first > 2 * noise * np.sqrt(2 / share):
        warnings.warn(
            f"heal ended with a loss of {last:.4g}, above {first:.4g} at its beginning (means of {share} of {len(losses)} batches). "
            "Take a smaller learning rate, or more batches.",
            UserWarning,
            stacklevel=3,
        )
