"""keep_pruned, keep_zeros and masks_in: what is refused, matching by path, export and checkpoints."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze

from jaxprune import apply_masks, keep_pruned, make_masks, masks_in
from jaxprune.transforms import keep_zeros
from tests.support.one_layer import KEEP, KERNEL, MASKS, assert_positive_zeros, dense_params, loss, step, train

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

# --- Bad input: errors name the leaf (promise 9). ---


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"kernel": MASKS["kernel"]}, r"masks has no entry for params\['bias'\]"),
        (MASKS | {"extra": jnp.ones(2, bool)}, r"masks\['extra'\] has no counterpart in params"),
        (MASKS | {"kernel": jnp.ones((3, 4), bool)}, r"params\['kernel'\] an array of bool\[3, 4\].*\[4, 3\]"),
        (MASKS | {"kernel": jnp.ones((4, 3))}, r"params\['kernel'\] an array of float32\[4, 3\]; a mask is bool"),
        (MASKS | {"kernel": True}, r"params\['kernel'\] an array of bool\[\]"),
    ],
    ids=["missing", "extra", "shape", "dtype", "prefix"],
)
@pytest.mark.parametrize("as_callable", [False, True])
def test_masks_that_do_not_fit(masks, message, as_callable):
    with pytest.raises(ValueError, match=message):
        keep_pruned((lambda params: masks) if as_callable else masks).init(dense_params())


@pytest.mark.parametrize("tx", [keep_pruned(MASKS), keep_zeros()], ids=["keep_pruned", "keep_zeros"])
def test_bad_updates(tx):
    params = dense_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"keep_\w+ needs the parameters .* update\(grads, state, params\)"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"updates\['other'\] has no counterpart in params"):
        tx.update(params | {"other": jnp.ones(2)}, state, params)


def test_masks_of_another_model_in_the_state():
    tx = keep_pruned(MASKS)
    state = tx.init(dense_params())
    other = {"dense": dense_params()}
    with pytest.raises(ValueError, match=r"masks has no entry for params\['dense'\]"):
        tx.update(other, state, other)
    for shape in (4, 4), (1, 3):  # the second would broadcast
        resized = {"kernel": jnp.ones(shape), "bias": jnp.ones(3)}
        with pytest.raises(ValueError, match=r"params\['kernel'\].*bool\[4, 3\]"):
            tx.update(resized, state, resized)


def test_keep_zeros_where_nothing_is_prunable():
    params = {"bias": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"No leaf is prunable. Found params\['bias'\]"):
        keep_zeros().update(params, optax.EmptyState(), params)


def test_masks_in_a_state_without_masks():
    with pytest.raises(ValueError, match="holds no masks"):
        masks_in(optax.adam(0.1).init(dense_params()))


# --- Masks meet parameters by path, whatever the containers. ---


def boxed(params: Any) -> Any:
    return {name: nn.Partitioned(leaf, names=(None,) * leaf.ndim) for name, leaf in params.items()}


class Layer(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.asarray(KERNEL))
        self.bias = nnx.Param(jnp.ones(3))


def nnx_state() -> Any:
    return nnx.state(Layer(), nnx.Param)


@pytest.mark.parametrize(
    ("masks", "at_init", "at_update"),
    [
        (freeze(MASKS), dense_params(), dense_params()),
        (MASKS, freeze(dense_params()), freeze(dense_params())),
        (MASKS, boxed(dense_params()), boxed(dense_params())),
        (boxed(MASKS), dense_params(), dense_params()),
        (MASKS, nnx_state(), nnx.as_pure(nnx_state())),
        (make_masks(nnx_state(), 0.5), nnx_state(), nnx.as_pure(nnx_state())),
    ],
    ids=["FrozenDict-dict", "dict-FrozenDict", "dict-boxed", "boxed-dict", "dict-nnx", "nnx-nnx"],
)
def test_masks_are_matched_by_path(masks, at_init, at_update):
    tx = keep_pruned(masks)
    new, state = step(tx, at_update, tx.init(at_init), optax.tree.ones_like(at_update))
    assert jax.tree.structure(new) == jax.tree.structure(at_update)
    # Leaves come in the order of the names: bias, kernel.
    for leaf, old, mask in zip(*map(jax.tree.leaves, (new, at_update, masks)), strict=True):
        np.testing.assert_array_equal(leaf, np.where(mask, old + 1.0, 0.0))
    chex.assert_trees_all_equal(jax.tree.leaves(masks_in(state)), jax.tree.leaves(masks))


def test_masks_in_intersects():
    one, two = (MASKS | {"kernel": jnp.asarray(keep)} for keep in (KEEP, np.arange(12).reshape(4, 3) % 2 == 0))
    state = optax.chain(keep_pruned(one), optax.chain(optax.identity(), keep_pruned(two))).init(dense_params())
    chex.assert_trees_all_equal(masks_in(state), MASKS | {"kernel": one["kernel"] & two["kernel"]})
    branches = optax.partition({"a": keep_pruned(one), "b": keep_pruned(two)}, {"kernel": "a", "bias": "b"})
    chex.assert_trees_all_equal(masks_in(branches.init(dense_params())), one)


def test_keep_zeros_holds_prunable_zeros_only():
    params = {"kernel": jnp.array([[1.0, 0.0], [-0.0, 2.0]]), "bias": jnp.array([0.0, 1.0])}
    new, _ = step(keep_zeros(), params, optax.EmptyState(), optax.tree.ones_like(params))
    np.testing.assert_array_equal(new["kernel"], [[2.0, 0.0], [0.0, 3.0]])
    assert_positive_zeros(new["kernel"][[0, 1], [1, 0]])
    np.testing.assert_array_equal(new["bias"], [1.0, 2.0])
    own = keep_zeros(prunable=lambda path, leaf: path == "bias")
    new, _ = step(own, params, optax.EmptyState(), optax.tree.ones_like(params))
    np.testing.assert_array_equal(new["kernel"], [[2.0, 1.0], [1.0, 3.0]])
    np.testing.assert_array_equal(new["bias"], [0.0, 2.0])


# --- Promise 10: the same program for cpu, cuda and tpu; and checkpoints. ---


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.slow
@pytest.mark.parametrize("transform", [keep_pruned, lambda masks: keep_zeros()], ids=["keep_pruned", "keep_zeros"])
def test_promise_10_a_training_step_exports_for_every_platform(transform):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(8, 6, 6, 1)), jnp.float32), jnp.arange(8) % 3
    model = CNN()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    masks = make_masks(params, 1.0)
    params = apply_masks(params, masks)
    tx = optax.chain(optax.adam(0.1), transform(masks))

    def train_step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def objective(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(objective)(params)
        return value, *step(tx, params, state, grads)

    exported = jax.export.export(jax.jit(train_step), platforms=("cpu", "cuda", "tpu"))(params, tx.init(params), x, y)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    state, values, call = tx.init(params), [], jax.jit(exported.call)
    for _ in range(3):
        value, params, state = call(params, state, x, y)
        values.append(float(value))
    assert values[-1] < values[0]
    for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        assert_positive_zeros(np.asarray(leaf)[~np.asarray(mask)])


def test_masks_and_state_survive_orbax(tmp_path):
    tx = optax.chain(optax.adam(0.1), keep_pruned(MASKS))
    params, state = train(tx, dense_params(), 3, loss)
    saved = {"params": params, "masks": MASKS, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        fresh = {"params": dense_params(), "masks": MASKS, "state": tx.init(dense_params())}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(tmp_path / "checkpoint", target)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal(masks_in(restored["state"]), MASKS)
    # And training goes on, bit for bit.
    onward = train(tx, restored["params"], 2, loss, restored["state"])
    chex.assert_trees_all_equal(onward, train(tx, params, 2, loss, state))
