"""Training that is stopped, saved by Orbax and resumed ends with the same bits, for every transform."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from one_layer import KEEP, MASKS, assert_positive_zeros, dense_params, loss, step

from jaxprune import (
    ac_dc_schedule,
    apply_masks,
    decay_pruned,
    keep_pruned,
    keep_zeros,
    make_masks,
    masks_in,
    prune,
    prune_and_regrow,
    rigl,
    sparse_evolution,
    static_sparse,
)

STEPS = 12


def quantile(params: Any, k: Any) -> Any:
    """Make masks that compile fast: what is larger than the share k of all magnitudes."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) >= jnp.quantile(jnp.abs(leaf), k), params)


CUBIC = optax.polynomial_schedule(0.0, 0.7, power=3, transition_steps=9)
TRANSFORMS = {
    "keep_pruned": lambda: optax.chain(optax.adam(0.05), keep_pruned(MASKS)),
    "keep_zeros": lambda: optax.chain(optax.adam(0.05), keep_zeros()),
    "prune": lambda: optax.chain(optax.adam(0.05), prune(quantile, CUBIC, every=4, until=9)),
    "prune_and_regrow": lambda: optax.chain(
        optax.adam(0.05), prune_and_regrow(quantile, ac_dc_schedule(0.5, period=3, finish=9), every=3, until=9)
    ),
    "decay_pruned": lambda: optax.chain(decay_pruned(lambda params: make_masks(params, 1.0), 0.1), optax.adam(0.05)),
    "static_sparse": lambda: static_sparse(optax.adam(0.05), MASKS),
    "rigl": lambda: rigl(optax.adam(0.05), MASKS, every=4, until=9),
    "sparse_evolution": lambda: sparse_evolution(optax.adam(0.05), MASKS, jax.random.key(3), every=4, until=9),
}


def save_and_restore(folder: Path, saved: Any, like: Any) -> Any:
    """Write a tree and read it back, knowing shapes and dtypes only, as another process would."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    tx = TRANSFORMS[name]()
    advance = jax.jit(lambda params, state: step(tx, params, state, jax.grad(loss)(params)))
    # Committed to a device, as what is restored will be.
    start = jax.device_put(apply_masks(dense_params(), MASKS), jax.devices()[0])
    runs = [jax.device_put((start, tx.init(start)), jax.devices()[0])]
    for _ in range(STEPS):
        runs.append(advance(*runs[-1]))
    for stop in np.random.default_rng(len(name)).permutation(np.arange(1, STEPS))[:2].tolist():
        # Another process makes the transform anew.
        like = start, TRANSFORMS[name]().init(start)
        restored = save_and_restore(tmp_path / str(stop), runs[stop], like)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, runs[stop])
        for _ in range(stop, STEPS):
            restored = advance(*restored)
        chex.assert_trees_all_equal(restored, runs[-1])
    assert advance._cache_size() == 1


def test_a_dense_checkpoint_goes_on_as_a_pruned_run(tmp_path):
    """The dense optimizer's state stands first in the chain; that of the transform is initialised."""
    dense = optax.adam(0.05)
    params, dense_state = dense_params(), dense.init(dense_params())
    for _ in range(3):
        params, dense_state = step(dense, params, dense_state, jax.grad(loss)(params))
    like = dense_params(), dense.init(dense_params())
    params, dense_state = save_and_restore(tmp_path / "dense", (params, dense_state), like)

    tx = optax.chain(dense, keep_pruned(MASKS))
    state = (dense_state, *tx.init(params)[1:])
    expected, _ = step(dense, params, dense_state, jax.grad(loss)(params))
    params, state = step(tx, params, state, jax.grad(loss)(params))
    np.testing.assert_array_equal(params["kernel"], np.where(KEEP, expected["kernel"], 0))
    assert_positive_zeros(np.asarray(params["kernel"])[~KEEP])
    assert int(state[0][0].count) == 4
    chex.assert_trees_all_equal(masks_in(state), MASKS)
