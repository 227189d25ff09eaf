"""The divergence between the predictions of two language models, without the logits of all tokens at once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import widen
from jaxprune.distill._tokens import check_tokens, mean, read_mask

Head = Callable[[jax.Array], jax.Array]


def logit_loss(
    student: jax.Array,
    teacher: jax.Array,
    student_head: Head,
    teacher_head: Head,
    *,
    mask: jax.Array | None = None,
    temperature: Any = 1.0,
    chunk: int = 128,
) -> jax.Array:
    """Return the Kullback-Leibler divergence of the student's next-token distribution from the teacher's.

    It is ``T^2 * mean over tokens of sum_v p_v * (log p_v - log q_v)``, with ``p`` the softmax of the teacher's logits over T, and
    ``q`` the student's: the gradient has the same size at every T. Logits are made for a few tokens at a time, forward and
    backward (which makes them once more), so that no array of ``[batch, length, vocabulary]`` ever exists; batch axes that
    are sharded stay where they are. What lies at a token that does not count has no effect, NaN included, and receives a
    gradient of zero. The teacher receives none.

    Args:
        student: the student's last hidden states ``[..., length, width]``, after its last norm.
        teacher: the teacher's, ``[..., length, other width]``.
        student_head: hidden states ``[..., n, width]`` to logits ``[..., n, vocabulary]``. What it closes over gets its gradient, a
            tied table for example: ``lambda h: jnp.einsum("...d,vd->...v", h, table, preferred_element_type=jnp.float32)``, which
            sums bfloat16 in float32 and, unlike ``h @ table.T``, makes XLA hold no transposed copy of the table.
        teacher_head: the same for the teacher. The vocabulary is the same.
        mask: bool ``[..., length]``, True for each token that counts, padding False; None counts all.
        temperature: T, above zero; may be traced.
        chunk: how many tokens, of all sequences together, have logits at a time (static); at least one of each sequence.

    Returns:
        A scalar, float32 (float64 where logits are), at least zero but for rounding; zero where no token counts.

    Raises:
        ValueError: the two are not hidden states of the same tokens, the mask or one head does not fit, or `chunk` is below 1.

    >>> import jax.numpy as jnp
    >>> table = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))  # each token's hidden state picks a row of log-probabilities
    >>> head = lambda hidden: hidden @ table
    >>> one, two = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    >>> round(float(logit_loss(one, two, head, head)), 4)  # 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    0.1308
    >>> float(logit_loss(two, two, head, head))
    0.0

    References:
        G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    tokens = check_tokens(student, teacher, ("student", "teacher"))
    counted = read_mask(mask, tokens)
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens, at least 1; got {chunk}.")
    _check_heads(student, teacher, student_head, teacher_head)
    positions = min(max(1, chunk // max(1, math.prod(tokens[:-1]))), max(1, tokens[-1]))
    pieces = [_pieces(x, positions, axis=len(tokens) - 1) for x in (student, jax.lax.stop_gradient(teacher), counted)]

    # Logits are forgotten after each piece, and made anew for its gradient.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(total: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, target, counts = piece
        kept = counts[..., None]
        student_logits = widen(student_head(jnp.where(kept, hidden, jnp.zeros_like(hidden))))
        teacher_logits = widen(jax.lax.stop_gradient(teacher_head(jnp.where(kept, target, jnp.zeros_like(target)))))
        losses = _divergence(student_logits, teacher_logits.astype(student_logits.dtype), temperature)
        return total + jnp.sum(jnp.where(counts, losses, jnp.zeros_like(losses))), None

    dtype = widen(jnp.zeros((), jax.eval_shape(student_head, student).dtype)).dtype
    total, _ = jax.lax.scan(step, jnp.zeros((), dtype), tuple(pieces))
    return mean(total, counted)


def _divergence(student: jax.Array, teacher: jax.Array, temperature: Any) -> jax.Array:
    """T^2 times the divergence of each token's distribution over the last axis."""
    t = jnp.asarray(temperature, student.dtype)
    log_q, log_p = jax.nn.log_softmax(student / t, axis=-1), jax.nn.log_softmax(teacher / t, axis=-1)
    p = jnp.exp(log_p)
    return t**2 * jnp.sum(jnp.where(p > 0, p * (log_p - log_q), jnp.zeros_like(p)), axis=-1)


def _pieces(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Cut an axis into pieces of one length, which come first; the last one is filled up with zeros."""
    missing = -x.shape[axis] % length
    filled = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    cut = filled.reshape(*x.shape[:axis], -1, length, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _check_heads(student: jax.Array, teacher: jax.Array, student_head: Head, teacher_head: Head) -> None:
    made = []
    for name, head, hidden in (("student_head", student_head, student), ("teacher_head", teacher_head, teacher)):
        found = jax.eval_shape(head, hidden)
        if getattr(found, "shape", ())[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"{name} makes {getattr(found, 'shape', type(found).__name__)} of hidden states {list(hidden.shape)}; "
                f"it is to make logits {[*hidden.shape[:-1], 'vocabulary']}."
            )
        made.append(found)
    if made[0].shape != made[1].shape:
        raise ValueError(
            f"student_head knows {made[0].shape[-1]} tokens and teacher_head {made[1].shape[-1]}; cut the teacher's logits "
            "to the tokens that the student keeps."
        )
