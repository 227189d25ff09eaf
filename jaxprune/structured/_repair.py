"""After a cut: what reads the channels makes up for those it lost, from a few batches and without training."""

from typing import Any

import jax

from jaxprune._tree._paths import flatten
from jaxprune.oneshot._reconstruct import reconstruct
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.structured._losses import is_repaired
from jaxprune.structured._plan import Plan
from jaxprune.structured._shrink import channel_masks


def repair(plan: Plan, params: Any, grams: Grams, *, steps: int = 30, damping: float | None = None) -> Any:
    """Give the weights that read channels the values that best make up for the channels they lose.

    Of every kernel whose inputs a plan cuts, the kept weights become the least-squares solution ``min ||X V - X W||`` with
    W the weights before and X the inputs over the calibration data: `reconstruct` with the plan's masks. Cut the result:
    ``shrink(plan, repair(plan, params, grams))``.

    Args:
        plan: which channels stay.
        params: the parameters before they are cut.
        grams: from `calibrate_grams` of the function that uses them, uncut.
        steps: as in `reconstruct`.
        damping: as in `reconstruct`.

    Returns:
        Parameters of the treedef, shapes and dtypes of params. Kernels whose inputs are not cut, biases and the like are
        as they were; so are weights that are used in two ways, such as an embedding that is the output layer as well, or in a way that
        is not understood.

    Raises:
        ValueError: the plan or the Gram matrices do not fit the parameters; the message names the leaf.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"up": jnp.eye(2), "down": jnp.array([[1.0], [2.0]])}
    >>> plan = Plan({"up": {1: (1,)}, "down": {0: (1,)}}, {"up": (2, 2), "down": (2, 1)})
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda p, x: x @ p["up"] @ p["down"], params, [data])  # [[2, 1], [1, 2]]
    >>> repair(plan, params, grams, damping=0.0)["down"].ravel().tolist()  # 2 + 1 * 1/2
    [0.0, 2.5]

    Reference: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, equation 1 with the
    channels given.
    """
    require_grams(grams, "repair(plan, params, grams)")
    masks = flatten(channel_masks(plan, params), "masks")
    readers = {
        site.path
        for site in grams.sites
        if set(site.in_axes) & set(plan.kept.get(site.path, ())) and is_repaired(grams.sites, site.path)
    }
    only = [mask if path in readers else None for path, mask in zip(masks.paths, masks.leaves, strict=True)]
    return reconstruct(params, jax.tree.unflatten(masks.treedef, only), grams, steps=steps, damping=damping)
