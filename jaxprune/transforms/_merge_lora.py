"""Low-rank adapters merged under a mask."""

import jax

from jaxprune._masks import apply_masks


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
