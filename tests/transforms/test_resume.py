"""Training that is stopped, saved by Orbax and resumed ends with the same bits, for every transform."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxprune import keep_pruned, masks_in, prune
from tests.support import resumable
from tests.support.one_layer import KEEP, MASKS, assert_positive_zeros, dense_params, loss, step

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.resumable import RUNS, STEPS, advance, begin

pytestmark = pytest.mark.optimised


def save_and_restore(folder: Path, saved: Any, like: Any) -> Any:
    """Write a tree and read it back, knowing shapes and dtypes only, as another process would."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_same_bits(name, tmp_path):
    take_step = jax.jit(advance(RUNS[name]))
    states = [begin(RUNS[name])]
    for _ in range(STEPS):
        states.append(take_step(states[-1]))
    for stop in np.random.default_rng(len(name)).permutation(np.arange(1, STEPS))[:2].tolist():
        restored = save_and_restore(tmp_path / str(stop), states[stop], begin(RUNS[name]))
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, states[stop])
        for _ in range(stop, STEPS):
            restored = take_step(restored)
        chex.assert_trees_all_equal(restored, states[-1])
    assert take_step._cache_size() == 1


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_another_bit_for_bit(tmp_path):
    """One process trains with all transforms and is killed by SIGKILL, perhaps while it saves; another one goes on."""
    folder = tmp_path / "checkpoints"

    def start() -> subprocess.Popen[bytes]:
        root = Path(resumable.__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root)}
        return subprocess.Popen([sys.executable, resumable.__file__, str(folder)], env=environment)

    def newest() -> int:
        return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)

    stop = int(np.random.default_rng().integers(1, STEPS - 2))
    process = start()
    while newest() < stop:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert stop <= newest() < STEPS
    assert start().wait(timeout=300) == 0

    expected = {name: begin(run) for name, run in RUNS.items()}
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == STEPS
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
        found = manager.restore(STEPS, args=ocp.args.StandardRestore(shapes))
    for name, run in RUNS.items():
        take_step, state = jax.jit(advance(run)), expected[name]
        for _ in range(STEPS):
            state = take_step(state)
        chex.assert_trees_all_equal(found[name], state)


PRUNING = {
    "keep_pruned": lambda: keep_pruned(MASKS),
    # The schedule begins where the dense run ended: the masks are made by its first update.
    "prune": lambda: prune(lambda params, k: jax.tree.map(lambda leaf: leaf >= k, params), 1.0, until=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNING)
def test_a_dense_checkpoint_goes_on_as_a_pruned_run(name, tmp_path):
    """The dense optimizer's state stands first in the chain; that of the transform is initialised."""
    dense = optax.adam(0.05)
    params, dense_state = dense_params(), dense.init(dense_params())
    for _ in range(3):
        params, dense_state = step(dense, params, dense_state, jax.grad(loss)(params))
    like = dense_params(), dense.init(dense_params())
    params, dense_state = save_and_restore(tmp_path / "dense", (params, dense_state), like)

    tx = optax.chain(dense, PRUNING[name]())
    state = (dense_state, *tx.init(params)[1:])
    expected, _ = step(dense, params, dense_state, jax.grad(loss)(params))
    params, state = step(tx, params, state, jax.grad(loss)(params))
    keep = KEEP if name == "keep_pruned" else np.asarray(expected["kernel"]) >= 1
    assert 0 < keep.sum() < keep.size
    np.testing.assert_array_equal(params["kernel"], np.where(keep, expected["kernel"], 0))
    assert_positive_zeros(np.asarray(params["kernel"])[~keep])
    assert int(state[0][0].count) == 4
    np.testing.assert_array_equal(masks_in(state)["kernel"], keep)
