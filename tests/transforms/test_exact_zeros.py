"""Promise 6: pruned weights are +0.0 with every optimizer of optax; and where that cannot hold, the remedy."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

from jaxprune import apply_masks, keep_pruned
from jaxprune.transforms import KeepPrunedState
from tests.support.one_layer import (
    KEEP,
    KERNEL,
    MASKS,
    TARGET,
    assert_positive_zeros,
    dense_params,
    loss,
    masked_loss,
    step,
    train,
)

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.slow import slow_but

pytestmark = pytest.mark.optimised


# --- Promise 6: exact zeros with every optimizer of optax. ---

# Functions of optax.contrib that are no optimizers; those named scale_by_... are parts of the ones tested.
NO_OPTIMIZERS = {
    "differentially_private_aggregate": "the first part of dpsgd",
    "hutchinson_estimator_diag_hessian": "the curvature estimate inside sophia",
    "normalize": "the scaling of sam's adversarial step",
    "reduce_on_plateau": "scales the updates of an optimizer",
    "schedule_free_eval_params": "reads the state of schedule_free",
}

# What an optimizer is given where its signature asks for it; a new required argument raises KeyError.
ARGUMENTS = {
    "learning_rate": 0.01,
    "key": 0,
    "seed": 0,
    "l2_norm_clip": 1.0,
    "noise_multiplier": 0.1,
    "inner": optax.sgd(0.01),
    "base_optimizer": optax.sgd(0.01),
    "optimizer": optax.sgd(0.01),
    "adv_optimizer": optax.chain(contrib.normalize(), optax.sgd(0.05)),
}

ALIAS_MODULE = inspect.getmodule(optax.sgd)


def is_alias(value: Any) -> bool:
    # nadam and nadamw are partials of adam and adamw.
    function = value.func if isinstance(value, functools.partial) else value
    return inspect.isfunction(function) and inspect.getmodule(function) is ALIAS_MODULE


def is_contrib_optimizer(name: str) -> bool:
    value = getattr(contrib, name)
    function = callable(value) and not inspect.isclass(value)
    return function and not name.startswith(("_", "scale_by_")) and name not in NO_OPTIMIZERS


OPTIMIZERS = {name: getattr(optax, name) for name in dir(optax) if is_alias(getattr(optax, name))} | {
    f"contrib.{name}": getattr(contrib, name) for name in dir(contrib) if is_contrib_optimizer(name)
}


def build(factory: Any) -> Any:
    parameters = inspect.signature(factory).parameters.values()
    asked = [p.name for p in parameters if p.default is p.empty or p.name == "key"]
    return factory(**{name: ARGUMENTS[name] for name in asked})


def extra_arguments(name: str, value: Any, grads: Any) -> dict[str, Any]:
    own = {"lbfgs": {"value": value, "grad": grads, "value_fn": loss}, "contrib.sam": {}}
    return own.get(name, {"value": value, "obj_fn": loss})


def test_the_enumeration_of_optimizers_is_complete():
    defined = {name for name, value in vars(ALIAS_MODULE).items() if is_alias(value) and not name.startswith("_")}
    assert defined <= set(OPTIMIZERS)
    assert {"adam", "sgd", "lbfgs", "nadamw", "polyak_sgd", "contrib.muon", "contrib.sophia"} <= set(OPTIMIZERS)
    assert len(OPTIMIZERS) >= 31 + 22
    # An optimizer that optax defines elsewhere still takes a learning rate.
    for name, value in vars(optax).items():
        if inspect.isfunction(value) and not name.startswith(("_", "scale_by_")):
            assert "learning_rate" not in inspect.signature(value).parameters or name in OPTIMIZERS


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", slow_but(["sgd", "adam", "adamw", "lion"], OPTIMIZERS))
def test_promise_6_exact_zeros_for_200_steps_of_every_optimizer(name, dtype):
    tx = optax.chain(build(OPTIMIZERS[name]), keep_pruned(MASKS))

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        # dpsgd takes one gradient per example; here there is one example.
        seen = jax.tree.map(lambda grad: grad[None], grads) if name == "contrib.dpsgd" else grads
        updates, state = tx.update(seen, state, params, **extra_arguments(name, value, grads))
        params = optax.apply_updates(params, updates)
        return (params, state), params["kernel"]

    # The weights start dense, so that the first step has to prune them.
    start = dense_params(dtype)
    kernels = jax.jit(lambda params: jax.lax.scan(body, (params, tx.init(params)), length=200)[1])(start)
    kernels = np.asarray(kernels).astype(np.float32)
    assert_positive_zeros(kernels[:, ~KEEP])
    assert np.isfinite(kernels).all()
    # In bfloat16 a small step may round away.
    assert dtype == jnp.bfloat16 or (kernels[-1] != KERNEL)[KEEP].any()


@functools.cache
def jitted_step(dtype: Any) -> Any:
    return jax.jit(lambda params, updates: step(keep_pruned(MASKS), params, KeepPrunedState(MASKS), updates)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_promise_6_any_finite_weight_lands_on_positive_zero(dtype, data):
    """Signed zeros, subnormals and the largest numbers included, and whatever the update is, NaN too."""
    words = st.lists(st.integers(0, 2**16 - 1), min_size=12, max_size=12)

    def draw() -> np.ndarray:
        high = np.array(data.draw(words), np.uint16)
        bits = high if dtype != "float32" else high.astype(np.uint32) << 16 | np.array(data.draw(words), np.uint16)
        return bits.view(jnp.dtype(dtype)).reshape(4, 3)

    kernel, updates = draw(), draw()
    kernel = np.where(np.isfinite(kernel.astype(np.float32)), kernel, kernel.dtype.type(1))
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3, dtype)}
    result = jitted_step(dtype)(params, {"kernel": jnp.asarray(updates), "bias": jnp.zeros(3, dtype)})["kernel"]
    assert_positive_zeros(np.asarray(result)[~KEEP])


@pytest.mark.parametrize("updates_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("params_dtype", ["float16", "bfloat16", "float32"])
def test_updates_narrower_or_wider_than_the_weights(params_dtype, updates_dtype):
    """A weight rounded to the dtype of its update would not be cancelled by it."""
    params = dense_params(params_dtype)
    updates = optax.tree.cast(optax.tree.ones_like(params), updates_dtype)
    new = step(keep_pruned(MASKS), params, KeepPrunedState(MASKS), updates)[0]["kernel"]
    assert new.dtype == params_dtype
    assert_positive_zeros(np.asarray(new)[~KEEP])


def test_kept_updates_pass_bit_for_bit():
    updates = {"kernel": jnp.asarray(TARGET), "bias": jnp.array([0.0, -0.0, jnp.nan])}
    out, _ = keep_pruned(MASKS).update(updates, KeepPrunedState(MASKS), dense_params())
    np.testing.assert_array_equal(np.asarray(out["kernel"])[KEEP].view(np.uint32), TARGET[KEEP].view(np.uint32))
    np.testing.assert_array_equal(np.asarray(out["bias"]).view(np.uint32), np.asarray(updates["bias"]).view(np.uint32))


def test_a_weight_that_is_nan_needs_apply_masks_first():
    params = {"kernel": jnp.full((4, 3), jnp.nan), "bias": jnp.zeros(3)}
    tx = keep_pruned(MASKS)
    grads = optax.tree.zeros_like(params)
    assert np.isnan(np.asarray(step(tx, params, tx.init(params), grads)[0]["kernel"])[~KEEP]).all()
    pruned = apply_masks(params, MASKS)
    assert_positive_zeros(np.asarray(step(tx, pruned, tx.init(params), grads)[0]["kernel"])[~KEEP])


def test_masks_are_state_not_constants():
    """One compiled step serves other masks, and its program holds no mask."""
    tx = optax.chain(optax.adam(0.1), keep_pruned(MASKS))
    params = dense_params()

    def advance(params: Any, state: Any) -> Any:
        return step(tx, params, state, jax.grad(loss)(params))

    assert not [const for const in jax.make_jaxpr(advance)(params, tx.init(params)).consts if const.dtype == bool]
    compiled = jax.jit(advance)
    for keep in (KEEP, ~KEEP):
        state = optax.chain(optax.adam(0.1), keep_pruned(MASKS | {"kernel": jnp.asarray(keep)})).init(params)
        for _ in range(2):
            new, state = compiled(params, state)
            assert_positive_zeros(np.asarray(new["kernel"])[~keep])
            assert (np.asarray(new["kernel"])[keep] != 0).all()
    assert compiled._cache_size() == 1


# --- Where exact zeros cannot hold, and the remedy. ---


def in_lookahead(objective: Any) -> Any:
    # Ten steps end on a synchronisation, which mixes the dense slow weights in.
    tx = optax.lookahead(optax.chain(optax.sgd(0.1), keep_pruned(MASKS)), sync_period=5, slow_step_size=0.5)
    return train(tx, optax.LookaheadParams.init_synced(dense_params()), 10, objective)[0].slow


def around_sam(objective: Any) -> Any:
    # Eleven steps end on an adversarial one; what sam adds afterwards the transform inside does not see, so it stays out.
    tx = contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2)
    return train(tx, dense_params(), 11, objective)[0]


def test_inside_sam_the_masks_are_refused():
    """Sam blends the states of its two optimizers as numbers, so boolean masks come back as integers."""
    inner = optax.chain(optax.sgd(0.1), keep_pruned(MASKS))
    tx = contrib.sam(inner, optax.chain(contrib.normalize(), optax.sgd(0.05)), sync_period=2)
    with pytest.raises(ValueError, match=r"masks has for params\['bias'\] an array of int32"):
        train(tx, dense_params(), 3, loss)


def in_schedule_free(objective: Any) -> Any:
    # Pruned after some dense steps, when the averaged and the fast weights have parted.
    dense = {name: jnp.ones_like(mask) for name, mask in MASKS.items()}
    tx = contrib.schedule_free(optax.chain(optax.sgd(0.1), keep_pruned(dense)), 0.1)
    params, state = train(tx, dense_params(), 5, loss)
    state = optax.tree.set(state, KeepPrunedState=KeepPrunedState(MASKS))
    return train(tx, params, 5, objective, state)[0]


def outside_schedule_free(objective: Any) -> Any:
    tx = optax.chain(contrib.schedule_free(optax.sgd(0.1), 0.1), keep_pruned(MASKS))
    params, state = train(tx, dense_params(), 10, objective)
    assert_positive_zeros(np.asarray(params["kernel"])[~KEEP])
    # The weights for evaluation are extrapolated from the ones held at zero.
    return contrib.schedule_free_eval_params(state[0], params)


@pytest.mark.parametrize("place", [in_lookahead, around_sam, in_schedule_free, outside_schedule_free])
def test_zeros_do_not_hold_here_and_apply_masks_is_the_remedy(place):
    assert np.abs(np.asarray(place(loss)["kernel"])[~KEEP]).max() > 1e-3
    final = apply_masks(place(masked_loss), MASKS)
    assert_positive_zeros(np.asarray(final["kernel"])[~KEEP])
    # What was trained is what is left: kept weights went towards their targets under the masks.
    assert loss(final) < 0.9 * masked_loss(dense_params())
