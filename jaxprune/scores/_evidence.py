"""Evidence for scores: aligned with the parameters by path, and averaged over batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_floating, is_function
from jaxprune._tree._paths import Tree, flatten
from jaxprune.scores._leaves import widen
from jaxprune.sites._calibrate import Grams, Norms


def align_evidence(evidence: Any, flat: Tree, what: str) -> list[Any]:
    """Return for each leaf of the parameters `flat` its evidence, checked; None where it needs none.

    `what` is what messages call the evidence. Leaves that are not floating-point need none; what the evidence
    has for them is ignored, be it nothing or the float0 zeros of ``jax.grad(..., allow_int=True)``.
    """
    needed = [path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_floating(leaf)]
    ignored = set(flat.paths).difference(needed)
    given = _without(flatten(evidence, what), ignored)
    found = dict(zip(needed, _without(flat, ignored).aligned(given), strict=True))
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        if path in found and (not is_floating(found[path]) or np.shape(found[path]) != np.shape(leaf)):
            dtype = getattr(found[path], "dtype", type(found[path]).__name__)
            raise ValueError(
                f"{what} for {name} are {dtype}{list(np.shape(found[path]))}, not floating-point numbers of its "
                f"shape {list(np.shape(leaf))}. Make {what} from the same parameters."
            )
    return [found.get(path) for path in flat.paths]


def require_scores(scores: Any) -> None:
    """Raise a TypeError where, in place of a tree of scores, there is a name, a function or what scores are made from."""
    if isinstance(scores, str):
        remedy = f"Call the function: scores=scores.{scores if scores.isidentifier() else 'saliency'}(params, ...)"
    elif isinstance(scores, Norms):
        remedy = "Make them: scores=scores.wanda(params, norms)"
    elif isinstance(scores, Grams):
        remedy = "Make them: scores=scores.obs(params, grams), or scores.wanda(params, grams.norms())"
    elif is_function(scores):
        remedy = "Call it with params and its evidence, as in scores=scores.wanda(params, norms)"
    else:
        return
    raise TypeError(f"scores is {described(scores)}, not a tree of scores like params. {remedy}.")


def _without(flat: Tree, ignored: set[str]) -> Tree:
    kept = [i for i, path in enumerate(flat.paths) if path not in ignored]
    paths, names, leaves = ([column[i] for i in kept] for column in (flat.paths, flat.names, flat.leaves))
    return Tree(flat.what, paths, names, leaves, flat.treedef)


@jax.jit
def _add(total: Any, new: Any) -> Any:
    return jax.tree.map(jnp.add, total, new)


def mean_over_batches(fn: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]) -> Any:
    """Average ``fn(params, batch)`` over any number of batches, in constant memory.

    `fn` is compiled once for each shape of batch, its results are added up in float32 (float64 stays), and
    every batch counts the same: let all be of one size.

    For `saliency`, `snip` and `gradient`, fn is ``jax.grad(loss)``. For `fisher` it is the mean over the
    batch of the squares of each example's own gradient::

        def squared_grads(params, batch):  # loss(params, example) is the loss of one example
            grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)
            return jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), grads)

    The square of a batch's mean gradient is no substitute: near a minimum, where the gradients of examples
    cancel, it is smaller by a factor of about the batch's size.

    Args:
        fn: ``(params, batch) -> tree of arrays``; it is compiled, so it must be pure.
        params: what fn takes first.
        batches: any iterable of batches (trees of arrays), each passed to fn as one argument; read once.

    Returns:
        The mean, of the structure that fn returns, in float32.

    Raises:
        ValueError: there is no batch.

    >>> import jax, jax.numpy as jnp
    >>> def loss(params, batch):
    ...     return jnp.mean(params["w"] * batch)
    >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
    >>> float(mean_over_batches(jax.grad(loss), {"w": jnp.array(2.0)}, batches)["w"])
    4.0
    """
    if not is_function(fn):
        raise TypeError(f"mean_over_batches(fn, params, batches) was given {described(fn)} where fn belongs.")
    evaluate = jax.jit(lambda params, batch: jax.tree.map(widen, fn(params, batch)))
    total, count = None, 0
    for batch in batches:
        new = evaluate(params, batch)
        total = new if count == 0 else _add(total, new)
        count += 1
    if count == 0:
        raise ValueError("mean_over_batches got no batch; an iterator that was read before is empty.")
    return jax.tree.map(lambda leaf: leaf / count, total)
