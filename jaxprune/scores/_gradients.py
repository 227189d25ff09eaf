"""Scores from gradients: how the loss changes with a weight, or without it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import read_arrays
from jaxprune.scores._evidence import align_evidence
from jaxprune.scores._leaves import floats, leaf_score, map_leaves, require_real_leaves, with_floats


@leaf_score
def _gradient(w: jax.Array, g: jax.Array) -> jax.Array:
    del w  # only its NaN counts
    return jnp.abs(g)


def gradient(params: Any, grads: Any) -> Any:
    """Score weights by the magnitude of their gradient, ``|g|``: how fast the loss changes with them.

    What drop-and-grow methods grow by (RigL).

    Args:
        params: a pytree of arrays.
        grads: gradients with the paths and shapes of params; see `mean_over_batches`.

    Returns:
        Scores of the treedef of params, float32.

    Raises:
        ValueError: grads lacks a leaf, has one too many or of another shape; the message names it.

    >>> import jax.numpy as jnp
    >>> gradient([jnp.array([2.0, 3.0])], [jnp.array([0.5, -4.0])])[0].tolist()
    [0.5, 4.0]

    Reference: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020,
    section 3.
    """
    flat = read_arrays(params, "params")
    return map_leaves(_gradient, flat, align_evidence(grads, flat, "grads"))


@leaf_score
def _saliency(w: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.abs(jnp.real(w * g))


def saliency(params: Any, grads: Any) -> Any:
    """Score weights by ``|w g|``, the change of the loss when a weight becomes zero, to first order (Taylor).

    Of a complex weight that change is ``|Re(w g)|``, with the gradient as JAX gives it.

    Arguments and errors as in `gradient`. The reference squares the product, which ranks the same.

    >>> import jax.numpy as jnp
    >>> saliency([jnp.array([2.0, 3.0])], [jnp.array([0.5, -4.0])])[0].tolist()
    [1.0, 12.0]

    Reference: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning",
    2019, section 3; for whole channels Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural
    Networks for Resource Efficient Inference", 2017, section 2.2.
    """
    flat = read_arrays(params, "params")
    return map_leaves(_saliency, flat, align_evidence(grads, flat, "grads"))


@leaf_score
def _fisher(w: jax.Array, squared: jax.Array) -> jax.Array:
    return 0.5 * jnp.square(w) * squared


def fisher(params: Any, squared_grads: Any) -> Any:
    """Score weights by ``w^2 E[g^2] / 2``, the change of the loss at a minimum when a weight becomes zero.

    This is Optimal Brain Damage with the diagonal of the empirical Fisher information for the Hessian's.

    Args:
        params: a pytree of arrays.
        squared_grads: the mean over examples of the square of each example's gradient, with the paths and
            shapes of params: see `mean_over_batches`, the square of a batch's gradient is something else. An
            estimate of the Hessian's diagonal, the original's evidence, fits as well.

    Returns:
        Scores of the treedef of params, float32.

    Raises:
        ValueError: squared_grads lacks a leaf, has one too many or of another shape; the message names it.
        TypeError: a leaf of params is complex.

    >>> import jax.numpy as jnp
    >>> fisher([jnp.array([2.0, -3.0])], [jnp.array([1.0, 4.0])])[0].tolist()
    [2.0, 18.0]

    Reference: LeCun, Denker, Solla, "Optimal Brain Damage", 1990, step 4 of the recipe, s_k = h_kk u_k^2 / 2;
    with the Fisher information, Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense
    networks and Fisher pruning", 2018.
    """
    flat = read_arrays(params, "params")
    require_real_leaves(flat, "scores.fisher")
    return map_leaves(_fisher, flat, align_evidence(squared_grads, flat, "squared_grads"))


@jax.jit
def _finite_sum(scores: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0.0))


def snip(params: Any, grads: Any) -> Any:
    """Score weights by their share of the connection sensitivity, ``|w g| / sum |w g|``.

    The sum runs over all floating-point leaves and leaves out what is not finite; the scores add up to one
    (all are zero where every product is). They rank as `saliency` does. The method scores a network at
    initialisation, on one batch.

    Arguments and errors as in `gradient`.

    >>> import jax.numpy as jnp
    >>> snip([jnp.array([2.0, 3.0])], [jnp.array([3.0, -6.0])])[0].tolist()
    [0.25, 0.75]

    Reference: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019,
    section 4.1.
    """
    products = saliency(params, grads)
    total = sum(map(_finite_sum, jax.tree.leaves(products)), 0.0)
    return jax.tree.map(lambda product: product / jnp.where(total > 0, total, 1.0), products)


@leaf_score
def _grasp(w: jax.Array, hessian_gradient: jax.Array) -> jax.Array:
    return w * hessian_gradient


def grasp(loss: Callable[[Any], jax.Array], params: Any) -> Any:
    """Score weights by ``w * (H g)``: how much gradient flow is lost with a weight, to first order.

    The gradient flow is ``g^T g``, the speed at which training decreases the loss. Removing weight w changes
    it by ``-2 w (H g)``. The paper writes ``S(-w) = -w * (H g)`` and removes the weights of the largest S,
    whose removal leaves the most flow; here larger = keep, hence the opposite sign. Scores may be negative:
    there, removal adds to the flow. H g is a Hessian-vector product, exact, at about the cost of four
    gradients; it is computed in the dtype of params.

    Args:
        loss: ``params -> scalar``, with the data inside (for several batches, their mean by ``jax.lax.map``).
            The paper divides the logits by a temperature of 200 before the cross-entropy; that is up to the
            loss.
        params: a pytree of arrays; the method scores a network at initialisation.

    Returns:
        Scores of the treedef of params, float32.

    Raises:
        TypeError: a leaf of params is complex.

    >>> import jax.numpy as jnp
    >>> def loss(params):  # g = (w0^3, 2 w1), the diagonal of H is (3 w0^2, 2)
    ...     return params[0] ** 4 / 4 + params[1] ** 2
    >>> [float(score) for score in grasp(loss, [jnp.array(2.0), jnp.array(3.0)])]
    [192.0, 36.0]

    Reference: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    2020, section 4 and algorithm 2.
    """
    flat = read_arrays(params, "params")
    require_real_leaves(flat, "scores.grasp")
    gradient_of = jax.grad(lambda weights: loss(flat.build(with_floats(flat, weights))))
    weights = floats(flat)
    _, products = jax.jvp(gradient_of, (weights,), (gradient_of(weights),))
    return map_leaves(_grasp, flat, with_floats(flat, products))


@leaf_score
def _movement(w: jax.Array, g: jax.Array, previous: jax.Array) -> jax.Array:
    return previous - jnp.real(w * g)


def movement(params: Any, grads: Any, *, previous: Any = None) -> Any:
    """Score weights by how far training moves them away from zero: the sum over steps of ``-w g``.

    One call adds one step; the scores are the running sum, to be carried along while training::

        moved = scores.movement(params, grads, previous=moved)  # before the update

    In the paper the gradient is that of the masked weights, which goes straight through to the dense ones, so
    that pruned weights may come back: ``grads = jax.grad(loss)(apply_masks(params, masks), batch)``.

    Args:
        params: a pytree of arrays, the weights before the step.
        grads: the step's gradients, with the paths and shapes of params.
        previous: the scores so far, with the paths and shapes of params; None starts at zero.

    Returns:
        The scores including this step, of the treedef of params, float32. They may be negative.

    Raises:
        ValueError: grads or previous lacks a leaf, has one too many or of another shape; the message says which.

    >>> import jax.numpy as jnp
    >>> moved = movement([jnp.array([2.0, -3.0])], [jnp.array([0.5, 1.0])])
    >>> movement([jnp.array([1.0, -4.0])], [jnp.array([0.5, 1.0])], previous=moved)[0].tolist()
    [-1.5, 7.0]

    Reference: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4 (the
    factor of the learning rate does not change the ranking and is left out).
    """
    flat = read_arrays(params, "params")
    grads = align_evidence(grads, flat, "grads")
    if previous is None:
        so_far = [jnp.zeros_like(jnp.real(leaf)) if is_floating(leaf) else None for leaf in flat.leaves]
    else:
        so_far = align_evidence(previous, flat, "previous")
    return map_leaves(_movement, flat, grads, so_far)
