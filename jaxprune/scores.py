"""Scores: parameters, and evidence, to a tree of numbers that says how much each weight matters.

Every score returns the treedef of `params` in float32 (float64 stays), larger = keep. Evidence (gradients,
statistics) is a tree with the same paths; its containers may be of other classes. A leaf that is not
floating-point scores zeros. A NaN weight, or one whose evidence is NaN, scores minus infinity: it goes first.
All work under ``jit`` and ``vmap`` and on sharded arrays; the scores are sharded like the parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._channel_scores import batch_norm_scale as batch_norm_scale
from jaxprune._channel_scores import channel_norm as channel_norm
from jaxprune._channel_scores import fpgm as fpgm
from jaxprune._evidence import align_evidence
from jaxprune._evidence import mean_over_batches as mean_over_batches
from jaxprune._leaf_scores import floats, leaf_score, map_leaves, nan_lowest, read_params, widen, with_floats
from jaxprune._paths import is_floating
from jaxprune._prunable import Stacked, stack_axes
from jaxprune._sharding import without_explicit_axes
from jaxprune._synflow import synflow as synflow
from jaxprune._synflow import synflow_masks as synflow_masks
from jaxprune.oneshot._allocate import obs as obs
from jaxprune.oneshot._wanda import ria as ria
from jaxprune.oneshot._wanda import wanda as wanda


@leaf_score
def _magnitude(w: jax.Array) -> jax.Array:
    return jnp.abs(w)


def magnitude(params: Any) -> Any:
    """Score weights by their magnitude, ``|w|``.

    What `make_masks` ranks by when it is given no scores, without a copy of the parameters.

    >>> import jax.numpy as jnp
    >>> magnitude([jnp.array([2.0, -3.0, jnp.nan])])[0].tolist()
    [2.0, 3.0, -inf]
    """
    return map_leaves(_magnitude, read_params(params))


@jax.jit
def _random(w: jax.Array, key: jax.Array, position: int) -> jax.Array:
    def draw(w: jax.Array, key: jax.Array) -> jax.Array:
        w = widen(w)
        noise = jax.random.uniform(jax.random.fold_in(key, position), w.shape, w.dtype)
        return nan_lowest(noise, w)

    return without_explicit_axes(draw, w)(w, key)


def random(params: Any, key: jax.Array) -> Any:
    """Score weights by uniform noise in [0, 1).

    Drawn in float32 whatever the dtype of the parameters: in bfloat16 most draws are ties, which go to low
    indices. Each leaf has its own key, derived from its position in the tree, so the scores depend on nothing
    but the key and the shapes: they are the same on every device, for every sharding and under jit.

    Args:
        params: a pytree of arrays.
        key: a PRNG key.

    Returns:
        Scores of the treedef of params, float32.

    >>> import jax, jax.numpy as jnp
    >>> scores = random([jnp.zeros(1000, jnp.bfloat16)], jax.random.key(0))[0]
    >>> scores.dtype, bool((scores >= 0).all() and (scores < 1).all()), len(set(scores.tolist()))
    (dtype('float32'), True, 1000)
    """
    flat = read_params(params)
    return map_leaves(lambda leaf, position: _random(leaf, key, position), flat, range(len(flat.leaves)))


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
    flat = read_params(params)
    return map_leaves(_gradient, flat, align_evidence(grads, flat, "grads"))


@leaf_score
def _saliency(w: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.abs(w * g)


def saliency(params: Any, grads: Any) -> Any:
    """Score weights by ``|w g|``, the change of the loss when a weight becomes zero, to first order (Taylor).

    Arguments and errors as in `gradient`. The reference squares the product, which ranks the same.

    >>> import jax.numpy as jnp
    >>> saliency([jnp.array([2.0, 3.0])], [jnp.array([0.5, -4.0])])[0].tolist()
    [1.0, 12.0]

    Reference: Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance Estimation for Neural Network Pruning",
    2019, section 3; for whole channels Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural
    Networks for Resource Efficient Inference", 2017, section 2.2.
    """
    flat = read_params(params)
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

    >>> import jax.numpy as jnp
    >>> fisher([jnp.array([2.0, -3.0])], [jnp.array([1.0, 4.0])])[0].tolist()
    [2.0, 18.0]

    Reference: LeCun, Denker, Solla, "Optimal Brain Damage", 1990, step 4 of the recipe, s_k = h_kk u_k^2 / 2;
    with the Fisher information, Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense
    networks and Fisher pruning", 2018.
    """
    flat = read_params(params)
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
    total = sum(map(_finite_sum, jax.tree.leaves(products)), jnp.zeros(()))
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

    >>> import jax.numpy as jnp
    >>> def loss(params):  # g = (w0^3, 2 w1), the diagonal of H is (3 w0^2, 2)
    ...     return params[0] ** 4 / 4 + params[1] ** 2
    >>> [float(score) for score in grasp(loss, [jnp.array(2.0), jnp.array(3.0)])]
    [192.0, 36.0]

    Reference: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow",
    2020, section 4 and algorithm 2.
    """
    flat = read_params(params)
    gradient_of = jax.grad(lambda weights: loss(flat.treedef.unflatten(with_floats(flat, weights))))
    weights = floats(flat)
    _, products = jax.jvp(gradient_of, (weights,), (gradient_of(weights),))
    return map_leaves(_grasp, flat, with_floats(flat, products))


@leaf_score
def _movement(w: jax.Array, g: jax.Array, previous: jax.Array) -> jax.Array:
    return previous - w * g


def movement(params: Any, grads: Any, previous: Any = None) -> Any:
    """Score weights by how far training moves them away from zero: the sum over steps of ``-w g``.

    One call adds one step; the scores are the running sum, to be carried along while training::

        moved = scores.movement(params, grads, moved)  # before the update

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
    >>> movement([jnp.array([1.0, -4.0])], [jnp.array([0.5, 1.0])], moved)[0].tolist()
    [-1.5, 7.0]

    Reference: Sanh, Wolf, Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020, section 4 (the
    factor of the learning rate does not change the ranking and is left out).
    """
    flat = read_params(params)
    grads = align_evidence(grads, flat, "grads")
    if previous is None:
        so_far = [jnp.zeros_like(leaf) if is_floating(leaf) else None for leaf in flat.leaves]
    else:
        so_far = align_evidence(previous, flat, "previous")
    return map_leaves(_movement, flat, grads, so_far)


def _lamp_layer(magnitudes: jax.Array) -> jax.Array:
    """Score one layer, [n], of finite magnitudes."""
    positions = lax.iota(jnp.int32, magnitudes.size)
    negated, positions = lax.sort((-magnitudes, positions), num_keys=1, is_stable=True)
    # Relative to the largest, so that squares neither overflow nor all underflow; after the sort, since two
    # neighbours may have the same quotient.
    squares = jnp.square(negated / jnp.where(negated[0] < 0, negated[0], 1.0))
    # Sums from the largest on are accurate in float32. A parallel sum may fall by a rounding error, which would
    # reverse the order of two weights, hence the running maximum.
    sums = lax.cummax(jnp.cumsum(squares))
    scores = jnp.where(sums > 0, squares / sums, 0.0)
    return jnp.zeros_like(scores).at[positions].set(scores, unique_indices=True)


@functools.partial(jax.jit, static_argnames="stack")
def _lamp(w: jax.Array, *, stack: int) -> jax.Array:
    def score(w: jax.Array) -> jax.Array:
        wide = widen(w)
        magnitudes = jnp.where(jnp.isfinite(wide), jnp.abs(wide), 0.0)
        layers = magnitudes.reshape(-1, math.prod(w.shape[stack:]))
        found = jax.vmap(_lamp_layer)(layers).reshape(w.shape)
        return nan_lowest(jnp.where(jnp.isinf(wide), jnp.inf, found), wide)

    return widen(w) if w.size == 0 else without_explicit_axes(score, w)(w)


def lamp(params: Any, *, stacked: Stacked | None = None) -> Any:
    """Score weights by ``w^2`` over the sum of the squares of the layer's weights that are not smaller.

    With `rules.global_sparsity` this is magnitude pruning whose sparsity of each layer follows from the
    scores: within a layer they never reverse the order of the magnitudes (neighbours may tie by rounding, and
    squares below 1e-38 of the largest are zero), and the largest weight of every layer has the score 1, so it
    goes last. Among equal weights the lower row-major index scores higher, the one that rules keep. Infinite
    weights score infinity and are left out of the sums; a layer of zeros scores zeros.

    The definition needs the weights in order, so this score sorts (several seconds for ten million weights on
    a CPU), and a sharded layer is gathered. The sums run from the largest weight on, accurate in float32.

    Args:
        params: a pytree of arrays, a layer of less than 2**31 weights each.
        stacked: names the leaves that stack layers, as in `make_masks` (static).

    Returns:
        Scores of the treedef of params, float32 in [0, 1].

    Raises:
        ValueError: `stacked` matches nothing.

    >>> import jax.numpy as jnp
    >>> lamp([jnp.array([1.0, -2.0, 2.0])])[0].tolist()  # 1/9, 4/4, 4/8
    [0.1111111119389534, 1.0, 0.5]

    Reference: Lee, Park, Mo, Ahn, Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021,
    equation 3.
    """
    flat = read_params(params)
    return map_leaves(lambda leaf, stack: _lamp(leaf, stack=stack), flat, stack_axes(stacked, flat))
