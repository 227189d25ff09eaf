"""Better masks by swaps: in each unit a kept and a pruned weight change places while its outputs come nearer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import own, require_real
from jaxprune._tree._masks import align_masks, all_true, kept
from jaxprune._tree._paths import read_arrays
from jaxprune.oneshot._exchange import exchange
from jaxprune.oneshot._solve import Solution, grams_in, in_groups, put_in, report
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.sites._factorise import check_damping
from jaxprune.sites._matrices import as_masked, is_pruned, sites_of


class Errors(NamedTuple):
    """What a layer's outputs on the calibration data are off by: the sum of squares, as a share of that of the outputs.

    Those of `swap_and_reconstruct` count its damping in, as an input that all weights have alike.

    Attributes:
        before: float32 [layers], with the masks that were given.
        after: float32 [layers], with those that were found.
    """

    before: jax.Array
    after: jax.Array


class Swapped(NamedTuple):
    """Masks after swaps.

    Attributes:
        params: the parameters under the masks found.
        masks: the masks; each unit keeps as many weights as before.
        errors: of each leaf with pruned weights, by its path.
    """

    params: Any
    masks: Any
    errors: dict[str, Errors]


def swap(params: Any, masks: Any, grams: Grams, *, within: int | None = None, sweeps: int = 10) -> Swapped:
    """Swap kept and pruned weights within each unit as long as its outputs come nearer; kept weights do not move.

    Every weight is tried with all partners of its unit, and takes the one by which ``|| (W - V)^T x ||^2`` falls most; a mask
    of which no swap is better is found once a sweep changes nothing. No unit is worse than it began. Counts of
    units stay, and of groups of inputs with `within`. Computed in float32; works under ``jit``, where leaves that multiply no
    calibrated data are put under their masks.

    Args:
        params: a pytree of arrays, the dense parameters.
        masks: their masks, True = keep, from any rule; None keeps a leaf whole.
        grams: from `calibrate_grams` of the function that uses them.
        within: swaps stay within groups of so many neighbouring inputs, 4 for masks of ``rules.n_m(4)``; None for whole units (static).
        sweeps: how often every weight is tried at most, >= 1 (static). A sweep costs ``inputs`` passes over a matrix.

    Returns:
        The parameters under the new masks, the masks, and each layer's error before and after.

    Raises:
        ValueError: a leaf with pruned weights multiplies no calibrated data, or is of another shape; its inputs form no such groups;
            masks do not fit; a Gram matrix is not finite. The message names the leaf.
        TypeError: a leaf with pruned weights is complex.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])  # [[2, 1], [1, 2]]
    >>> found = swap(params, {"kernel": jnp.array([[True], [False]])}, grams)  # off by 4 * 2 of 14, then by 1 * 2
    >>> found.masks["kernel"].ravel().tolist(), [round(14 * float(error[0])) for error in found.errors["kernel"]]
    ([False, True], [8, 2])

    Reference: Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025.
    """
    return _swapped(params, masks, grams, None, within, sweeps, 0, "swap")


def swap_and_reconstruct(
    params: Any,
    masks: Any,
    grams: Grams,
    *,
    within: int | None = None,
    sweeps: int = 3,
    steps: int = 30,
    damping: float = 0.01,
) -> Swapped:
    """Swap as `swap` does, where weights that stay make up for those that go, and the one that comes takes its best value.

    It begins with the masked least squares of `reconstruct`, prices a swap with the best value for the weight that comes in,
    and solves the least squares anew behind each sweep. No unit is worse than `reconstruct` alone leaves it.

    Args:
        params: as in `swap`: the dense parameters, whose outputs are to be matched.
        masks: as in `swap`.
        grams: as in `swap`.
        within: as in `swap`.
        sweeps: as in `swap`.
        steps: of conjugate gradients behind each sweep, >= 1 (static).
        damping: as in `sparsegpt`.

    Returns:
        As `swap`; the errors before are those with the masks given, reconstructed.

    Raises:
        ValueError: as `swap`.
        TypeError: as `swap`.

    Warns:
        DampingWarning: damping was raised, as in `sparsegpt`.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
    >>> data = jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> grams = jaxprune.calibrate_grams(lambda params, x: x @ params["kernel"], params, [data])
    >>> found = swap_and_reconstruct(params, {"kernel": jnp.array([[True], [False]])}, grams, damping=0.0)
    >>> found.params["kernel"].ravel().tolist()  # 2 + 1 * 1/2
    [0.0, 2.5]

    Reference: the swaps of Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025, on the error that is left
    by the least squares of Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024, equation 2.
    """
    check_damping(damping, "swap_and_reconstruct")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"swap_and_reconstruct takes a whole number of steps, >= 1; got {steps!r}.")
    return _swapped(params, masks, grams, damping, within, sweeps, steps, "swap_and_reconstruct")


def _swapped(
    params: Any,
    masks: Any,
    grams: Grams,
    damping: float | None,
    within: int | None,
    sweeps: int,
    steps: int,
    title: str,
) -> Swapped:
    for name, number, least in (("sweeps", sweeps, 1), ("within", 2 if within is None else within, 2)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{title} takes a whole number of {name}, >= {least}; got {number!r}.")
    read_arrays(params, "params")
    require_grams(grams, f"{title}(params, masks, grams)")
    flat = grams.sites.require_params(params)
    leaves, found_masks, errors = [], [], {}
    for path, name, leaf, mask in zip(flat.paths, flat.names, flat.leaves, align_masks(masks, flat), strict=True):
        if not is_pruned(mask, leaf, grams, path):
            leaves.append(as_masked(leaf, mask))
            found_masks.append(all_true(leaf) if mask is None else own(mask))
            continue
        require_real(leaf, name, title)
        dense, leaf, parts = leaf, kept(leaf, mask), []
        for site in sites_of(grams, path, title):
            weights, order = in_groups(site, dense, within or 1)
            if within is not None and weights.shape[1] % within:
                raise ValueError(
                    f"Groups of {within} do not divide the {weights.shape[1]} inputs of {name}. Choose another within=, or None."
                )
            begin = site.matrices(mask)
            found = exchange(
                weights,
                grams_in(grams, site, order),
                begin if order is None else begin[:, order],
                damping,
                within=within,
                sweeps=sweeps,
                steps=steps,
            )
            report(Solution(found.weights, found.mask, found.damping, found.condition), name, damping or 0.0)
            leaf = put_in(site, leaf, found.weights, order)
            mask = put_in(site, mask, found.mask, order)
            parts.append((found.before, found.after))
        leaves.append(leaf)
        found_masks.append(mask)
        errors[path] = Errors(*(jnp.concatenate(each) for each in zip(*parts, strict=True)))
    return Swapped(flat.build(leaves), flat.build(found_masks), errors)
