"""How strongly weights are held to where they were: the damping that would serve data not seen best."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from jaxprune.oneshot._least_squares import reconstruct_matrix, solve_kept, times
from jaxprune.sites._factorise import Factor

# The shares of the mean diagonal to choose from; the first is taken where no samples speak for another.
_SHARES = 10.0 ** np.arange(1.0, -6.5, -0.5)
# So many units, and as many random vectors, are enough to tell the shares apart.
_UNITS = 16
# Nothing is learnt from a fit with more parameters than this share of the samples.
_MOST_PARAMETERS = 0.8


def choose_damping(
    weights: Float32[Array, "inputs outputs"],
    mask: Bool[Array, "inputs outputs"],
    factor: Factor,
    samples: Float32[Array, ""],
    *,
    steps: int,
) -> Float32[Array, ""]:
    """Return what to add to the damping that a factor holds, for the least error on data not seen.

    Generalised cross-validation: a fit of n samples with ``d = trace((H_SS + c I)^-1 H_SS)`` effective parameters leaves
    on other samples about ``1 / (1 - d / n)^2`` times the squared error that it leaves on these. Both are found for a few
    units by the steps that the solution takes, for all dampings c at once, and the trace by random signs.

    Args:
        weights: the dense W.
        mask: True = keep.
        factor: of H, with the least damping that float32 allows.
        samples: n.
        steps: as in `reconstruct_matrix` (static).

    Reference: Golub, Heath, Wahba, "Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter", 1979,
    equation 1.4.
    """
    inputs, outputs = weights.shape
    some = mask.any(0) & ~mask.all(0)  # of the other units none depends on the damping
    units = jnp.argsort(~some, stable=True)[jnp.arange(_UNITS) % outputs]
    shares = jnp.maximum(jnp.asarray(_SHARES, jnp.float32), factor.damping)
    extra = jnp.repeat(shares - factor.damping, _UNITS)[None]

    def for_each_share(columns: jax.Array) -> jax.Array:
        return jnp.tile(columns, (1, len(_SHARES)))

    def mean_of_units(values: jax.Array) -> jax.Array:
        return jnp.mean(jnp.where(some[units], values.reshape(len(_SHARES), _UNITS), 0.0), 1)

    kept, dense = for_each_share(mask[:, units]), for_each_share(weights[:, units])
    change = reconstruct_matrix(dense, kept, factor.gram, steps=steps, extra=extra) - dense
    errors = jnp.sum(change * times(factor.gram, change, -factor.damping), 0)
    signs = jax.random.rademacher(jax.random.key(0), (inputs, _UNITS), jnp.float32)
    signs = jnp.where(kept, for_each_share(signs), 0.0)
    inverse = solve_kept(factor.gram, kept, signs, jnp.zeros_like(signs), steps=steps, extra=extra)
    parameters = jnp.sum(kept, 0, dtype=jnp.float32) - jnp.repeat(shares, _UNITS) * jnp.sum(signs * inverse, 0)
    share = mean_of_units(parameters) / samples
    fits = share < _MOST_PARAMETERS
    left = jnp.where(fits, 1 - share, 1.0)
    criterion = jnp.where(fits, jnp.maximum(mean_of_units(errors), 0.0) / jnp.square(left), jnp.inf)
    return shares[jnp.argmin(criterion)] - factor.damping
