"""How far a student's hidden states are from its teacher's."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import widen
from jaxprune._tree._paths import flatten
from jaxprune.distill._tokens import check_tokens, mean, read_mask


def hidden_loss(student: Any, teacher: Any, *, mask: jax.Array | None = None) -> jax.Array:
    """Return the squared error of hidden states, relative to the teacher's: beside `logit_loss` where layers were dropped.

    It is the mean over tokens, and then over the leaves, of ``|s - t|^2 / |t|^2``. Each token is measured by its own length,
    since in residual streams of language models a few tokens, the first above all, are a thousand times longer than the
    others, and would be all that a plain mean sees. The teacher receives no gradient.

    Args:
        student: hidden states ``[..., length, width]``, or a pytree of them: one for each layer that is compared.
        teacher: the same tree, with the hidden states that they are to match, of the same widths.
        mask: bool ``[..., length]``, True for each token that counts; None counts all. What lies at another has no effect,
            NaN included.

    Returns:
        A scalar, float32 (float64 stays); zero where no token counts.

    Raises:
        ValueError: a leaf has no counterpart or one of another shape, or the mask does not fit. The message names the leaf.

    >>> import jax.numpy as jnp
    >>> float(hidden_loss({"layer_3": jnp.array([[3.0, 0.0]])}, {"layer_3": jnp.array([[3.0, 4.0]])}))  # 16 / 25
    0.6399999856948853

    References:
        A. Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, equation 3 (there without the division).
        X. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020, equation 8.
    """
    flat = flatten(student, "student")
    pairs = flatten(teacher, "teacher")
    targets = flat.aligned(pairs)
    if not flat.leaves:
        raise ValueError("student holds no hidden states; give at least one pair.")
    names = dict(zip(pairs.paths, pairs.names, strict=True))
    losses = []
    for path, name, hidden, target in zip(flat.paths, flat.names, flat.leaves, targets, strict=True):
        tokens = check_tokens(hidden, target, (name, names[path]))
        if hidden.shape != target.shape:
            raise ValueError(
                f"{name} is {list(hidden.shape)} and {names[path]} {list(target.shape)}; project one of them to the other's width."
            )
        losses.append(_relative_error(hidden, jax.lax.stop_gradient(target), read_mask(mask, tokens)))
    return sum(losses[1:], losses[0]) / len(losses)


def _relative_error(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
    kept = mask[..., None]
    target = jnp.where(kept, widen(teacher), 0)
    # In the wider of both dtypes, the student's: float64 stays.
    found = jnp.where(kept, widen(student), 0)
    error = jnp.sum(jnp.square(found - target.astype(found.dtype)), axis=-1)
    length = jnp.sum(jnp.square(target), axis=-1).astype(error.dtype)
    # A teacher's state of length zero has nothing to be measured against.
    relative = jnp.where(length > 0, error / jnp.where(length > 0, length, 1), error)
    return mean(jnp.sum(relative), mask)
