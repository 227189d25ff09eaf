"""Pruning in rounds: train, prune, and start again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._masks import apply_masks, require_make
from jaxprune._tree._paths import flatten


class Round(NamedTuple):
    """One round of `iterate`.

    Attributes:
        k: its strength.
        masks: made at its start, True = keep.
        params: trained under them.
    """

    k: Any
    masks: Any
    params: Any

    def __repr__(self) -> str:
        """Return its strength and how many arrays it holds, which themselves would fill screens."""
        k = (
            f"k = {self.k:g}"
            if isinstance(self.k, int | float | jax.Array | np.generic | np.ndarray) and np.ndim(self.k) == 0
            else "a k for each layer"
        )
        return f"<Round: {k}, masks and params of {len(jax.tree.leaves(self.params)):,} arrays>"


def iterate(
    train: Callable[[Any, Any], Any],
    make: Callable[[Any, Any], Any],
    params: Any,
    ks: Iterable[Any],
    *,
    rewind_to: Any = None,
) -> Iterator[Round]:
    """Prune iteratively: for each k, make masks from the parameters, apply them, and train under them.

    One-shot pruning and fine-tuning is a single k; rising ks are iterative magnitude pruning; with `rewind_to` each
    round's survivors start from earlier weights: those of the initialisation (the lottery ticket) or of an early step
    (weight rewinding). For learning-rate rewinding leave `rewind_to` out and let `train` begin its schedule anew.
    Lazy: a round runs when it is asked for, and only one is held. `train` gets masks as an argument, so that, jitted,
    it is compiled once for all rounds.

    Args:
        train: ``(params, masks) -> params``; it must keep pruned weights at zero (`keep_pruned`).
        make: ``(params, k) -> masks``. A pruned weight, being zero, ranks lowest, so that rising ks are nested.
        params: trained parameters. (Untrained ones, with a k that prunes nothing first, train in the first round.)
        ks: the strengths, one for each round.
        rewind_to: parameters of the same tree to start every round's training from; None goes on from the current ones.

    Returns:
        An iterator of a `Round` for each k; its params are those after training.

    Raises:
        TypeError: make is no function of parameters, or ks one number.
        ValueError: `rewind_to` has other paths or shapes than `params`; whatever `make` raises.

    >>> import functools, jax.numpy as jnp
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> for r in iterate(lambda params, masks: params, make, params, [0.25, 0.5]):
    ...     print(r.k, r.params["kernel"].ravel().tolist())
    0.25 [0.0, 2.0, 3.0, 4.0]
    0.5 [0.0, 0.0, 3.0, 4.0]

    Reference: Frankle, Carbin, "The Lottery Ticket Hypothesis", 2019; Renda, Frankle, Carbin, "Comparing Rewinding and
    Fine-tuning in Neural Network Pruning", 2020.
    """
    require_make(make, "iterate(train, make, params, ks)")
    require_several(ks)
    if rewind_to is not None:
        _require_same(rewind_to, params)
    return _rounds(train, make, params, ks, rewind_to)


def require_several(ks: Any) -> None:
    """Raise a TypeError where there is one strength in place of several."""
    if not isinstance(ks, Iterable) or (hasattr(ks, "ndim") and not ks.ndim):
        raise TypeError(f"ks are several strengths, not {ks!r}. For one, write ks=[{ks!r}].")


def _rounds(train: Any, make: Any, params: Any, ks: Iterable[Any], rewind_to: Any) -> Iterator[Round]:
    for k in ks:
        masks = make(params, k)
        params = train(apply_masks(params if rewind_to is None else rewind_to, masks), masks)
        yield Round(k, masks, params)


def _require_same(rewind_to: Any, params: Any) -> None:
    late = flatten(params, "params")
    early = late.aligned(flatten(rewind_to, "rewind_to"))
    for name, leaf, start in zip(late.names, late.leaves, early, strict=True):
        if jnp.shape(start) != jnp.shape(leaf):
            raise ValueError(
                f"rewind_to has for {name} an array of shape {list(jnp.shape(start))}, not {list(jnp.shape(leaf))}. "
                "Rewind to earlier parameters of the same model."
            )
