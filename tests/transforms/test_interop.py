"""Every transform of jaxprune against every wrapper of optax, TrainState and nnx.Optimizer.

A new transform joins by one line in `TRANSFORMS`; a new wrapper by one line in `WRAPPERS`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune import apply_masks, keep_pruned, make_masks, masks_in, prune, rigl, scores
from jaxprune.transforms import (
    ElsaState,
    PruneState,
    elsa,
    keep_zeros,
    prune_and_regrow,
    prune_and_splice,
    prune_by_gradients,
    sparse_evolution,
    static_sparse,
)

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.slow import slow_but

STEPS = 6


def make(params: Any) -> Any:
    return make_masks(params, 1.0)


def by_scores(params: Any, mean: Any, k: Any) -> Any:
    return make_masks(params, k, scores=mean)


# name: (inner optimizer, masks) -> a complete optimizer.
TRANSFORMS: dict[str, Callable[[Any, Any], optax.GradientTransformationExtraArgs]] = {
    "keep_pruned(masks)": lambda inner, masks: optax.chain(inner, keep_pruned(masks)),
    "keep_pruned(callable)": lambda inner, masks: optax.chain(inner, keep_pruned(make)),
    "keep_zeros": lambda inner, masks: optax.chain(inner, keep_zeros()),
    "prune": lambda inner, masks: optax.chain(inner, prune(make_masks, 1.0, every=3, until=4)),
    "prune_and_regrow": lambda inner, masks: optax.chain(inner, prune_and_regrow(make_masks, 1.0, every=3, until=4)),
    "prune_and_splice": lambda inner, masks: optax.chain(
        inner, prune_and_splice(make_masks, 0.9, back=1.1, every=1, until=2)
    ),
    "static_sparse": lambda inner, masks: static_sparse(inner, masks),
    "rigl": lambda inner, masks: rigl(inner, masks, every=3, until=3, drop_fraction=0.3),
    "sparse_evolution": lambda inner, masks: sparse_evolution(inner, masks, jax.random.key(0), every=3, until=3),
    "prune_by_gradients": lambda inner, masks: prune_by_gradients(
        inner, by_scores, 1.0, measure=scores.saliency, every=3, until=4
    ),
    "elsa": lambda inner, masks: elsa(inner, make_masks, 1.0, penalty=0.1, every=1, until=2),
}
WITH_MASKS = [name for name in TRANSFORMS if name != "keep_zeros"]
WITH_FIXED_MASKS = ["keep_pruned(masks)", "keep_pruned(callable)", "static_sparse"]

MOMENTUM = optax.sgd(0.01, momentum=0.9)
KERNEL_ONLY = {"dense": {"kernel": True, "bias": False}}
LABELS = {"dense": {"kernel": "pruned", "bias": "plain"}}

# name: (wrap: inner optimizer -> complete optimizer) -> what the training loop sees.
WRAPPERS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "alone": lambda wrap: wrap(optax.adam(0.1)),
    "chain": lambda wrap: optax.chain(optax.clip_by_global_norm(1.0), wrap(optax.adamw(0.1))),
    "named_chain": lambda wrap: optax.named_chain(("clip", optax.clip(1.0)), ("sparse", wrap(optax.lion(0.1)))),
    "masked": lambda wrap: optax.masked(wrap(MOMENTUM), KERNEL_ONLY),
    "partition": lambda wrap: optax.partition({"pruned": wrap(optax.adam(0.1)), "plain": optax.sgd(0.1)}, LABELS),
    "MultiSteps": lambda wrap: optax.MultiSteps(wrap(MOMENTUM), 2).gradient_transformation(),
    "MultiSteps inside": lambda wrap: wrap(optax.MultiSteps(MOMENTUM, 2).gradient_transformation()),
    "apply_if_finite": lambda wrap: optax.apply_if_finite(wrap(MOMENTUM), 3),
    "inject_hyperparams": lambda wrap: optax.inject_hyperparams(lambda lr: wrap(optax.adam(lr)))(
        lr=optax.linear_schedule(0.1, 0.05, STEPS)
    ),
}

every_transform = pytest.mark.parametrize("transform", TRANSFORMS)
every_wrapper = pytest.mark.parametrize("wrapper", slow_but(["chain", "MultiSteps"], WRAPPERS))


def dense_params(dtype: Any = jnp.float32) -> Any:
    """Return kernel and bias of one layer; a row per device."""
    kernel = jax.random.normal(jax.random.key(0), (8, 3), dtype)
    return {"dense": {"kernel": kernel, "bias": jnp.ones(3, dtype)}}


def pruned_params(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    params = dense_params(dtype)
    masks = make(params)
    return apply_masks(params, masks), masks


def loss(params: Any) -> jax.Array:
    # The gradient is far from zero everywhere, at pruned weights too.
    return sum(jnp.sum((leaf.astype(jnp.float32) - 3.0) ** 2) for leaf in jax.tree.leaves(params))


gradient = jax.grad(loss)


def optimizer(transform: str, wrapper: str, masks: Any) -> Any:
    return WRAPPERS[wrapper](lambda inner: TRANSFORMS[transform](inner, masks))


def train_step(tx: Any, params: Any, state: Any, grad: Any = gradient, **extra_args: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grad(params), state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def kernel_of(tree: Any) -> np.ndarray:
    return np.asarray(tree["dense"]["kernel"])


def held_masks(transform: str, masks: Any) -> Callable[[Any], Any]:
    """Return what reads from the state the masks that hold now; without a state they are those of the start."""
    if transform in ("elsa", "prune_and_splice"):
        return held_in_the_end
    return masks_in if transform in WITH_MASKS else lambda state: masks


def held_in_the_end(state: Any) -> Any:
    """Return the masks once weights are held under them; until then the weights are dense, and all count as kept."""

    def found(node: Any) -> bool:
        return isinstance(node, ElsaState | PruneState)

    node = next(filter(found, jax.tree.leaves(state, is_leaf=found)))
    (count,) = jax.tree.leaves(node.count)
    return jax.tree.map(lambda mask: mask | (count <= 2), node.masks)


def assert_positive_zeros(kernels: Any, keep: Any) -> None:
    """Assert that each pruned weight is +0.0, its sign bit clear, and that kept ones are numbers."""
    kernels, keep = np.asarray(kernels), np.broadcast_to(np.asarray(keep), np.shape(kernels))
    assert not keep.all()
    pruned = kernels[~keep].astype(np.float32)
    np.testing.assert_array_equal(pruned, 0.0)
    assert not np.signbit(pruned).any()
    assert np.isfinite(kernels[keep].astype(np.float32)).all()


class Run(NamedTuple):
    """A training run under `lax.scan`: what it started from, and kernel and mask after every step."""

    masks: Any
    params: Any
    state: Any
    kernels: np.ndarray
    keep: np.ndarray
    final_params: Any
    final_state: Any


def scan(transform: str, tx: Any, params: Any, masks: Any, grad: Any = gradient) -> Run:
    held = held_masks(transform, masks)
    state = tx.init(params)

    def body(carry: Any, _: None) -> Any:
        params, state = train_step(tx, *carry, grad)
        return (params, state), (params["dense"]["kernel"], held(state)["dense"]["kernel"])

    last, history = jax.jit(lambda *start: jax.lax.scan(body, start, length=STEPS))(params, state)
    return Run(masks, params, state, *map(np.asarray, history), *last)


@functools.cache
def run(transform: str, wrapper: str) -> Run:
    params, masks = pruned_params()
    return scan(transform, optimizer(transform, wrapper, masks), params, masks)


@pytest.mark.slow
@every_wrapper
@every_transform
def test_pruned_weights_are_positive_zero_after_every_scanned_step(transform, wrapper):
    result = run(transform, wrapper)
    assert_positive_zeros(result.kernels, result.keep)
    moved = kernel_of(result.final_params) != kernel_of(result.params)
    assert moved[result.keep[-1]].all()


@every_wrapper
@every_transform
def test_scan_keeps_structure_shapes_and_dtypes(transform, wrapper):
    result = run(transform, wrapper)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.state, result.final_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, result.final_params)


@every_wrapper
@pytest.mark.parametrize("transform", WITH_FIXED_MASKS)
def test_masks_in_finds_the_masks(transform, wrapper):
    result = run(transform, wrapper)
    for state in result.state, result.final_state:
        np.testing.assert_array_equal(kernel_of(masks_in(state)), kernel_of(result.masks))
    if wrapper not in ("masked", "partition"):
        chex.assert_trees_all_equal(masks_in(result.state), result.masks)


@every_wrapper
@every_transform
def test_init_on_shapes_alone(transform, wrapper):
    result = run(transform, wrapper)
    tx = optimizer(transform, wrapper, result.masks)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), result.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), result.state)


@every_wrapper
@every_transform
def test_tree_map_params_treats_masks_as_parameters(transform, wrapper):
    result = run(transform, wrapper)
    tx = optimizer(transform, wrapper, result.masks)
    marked = optax.tree.map_params(tx, lambda leaf: "params", result.state, transform_non_params=lambda leaf: "other")
    assert jax.tree.structure(marked) == jax.tree.structure(result.state)
    if transform in WITH_MASKS:
        assert set(jax.tree.leaves(masks_in(marked))) == {"params"}


@pytest.mark.slow
@every_wrapper
@every_transform
def test_second_step_compiles_nothing_and_donation_spares_the_masks(transform, wrapper):
    params, masks = pruned_params()
    tx = optimizer(transform, wrapper, masks)
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    state, held = tx.init(params), held_masks(transform, masks)
    first_params, first_state, history = params, state, []
    for _ in range(STEPS):
        # Extra arguments that nobody asked for are accepted.
        params, state = step(params, state, value=jnp.float32(0), unheard_of=jnp.float32(0))
        history.append((np.array(kernel_of(params)), np.array(kernel_of(held(state)))))  # copies outlive donation
    assert step._cache_size() == 1
    # In MultiSteps a transform that makes masks has none before the first update that is emitted; some prune at the third.
    assert_positive_zeros(*map(np.stack, zip(*history, strict=True)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first_params))
    if transform in WITH_MASKS:
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first_state) if leaf.dtype == bool and leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(masks))


@pytest.mark.slow
@every_transform
def test_apply_if_finite_rejects_and_goes_on(transform):
    params, masks = pruned_params()
    tx = optimizer(transform, "apply_if_finite", masks)
    state, held, history = tx.init(params), held_masks(transform, masks), []
    for factor in (1.0, jnp.nan, jnp.inf, 1.0, 1.0):
        before = params
        grads = optax.tree.scale(factor, gradient(params))
        params, state = train_step(tx, params, state, lambda _, grads=grads: grads)
        history.append((kernel_of(params), kernel_of(held(state))))
        assert np.array_equal(kernel_of(before), kernel_of(params)) == (factor != 1.0)
    assert_positive_zeros(*map(np.stack, zip(*history, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype"),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
)
@every_transform
def test_dtypes(transform, params_dtype, grads_dtype):
    params, masks = pruned_params(params_dtype)

    def grad(params: Any) -> Any:
        return optax.tree.cast(gradient(params), grads_dtype)

    tx = TRANSFORMS[transform](optax.sgd(0.01), masks)
    result = scan(transform, tx, params, masks, grad)
    assert_positive_zeros(result.kernels, result.keep)
    chex.assert_trees_all_equal_dtypes(result.final_params, params)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@every_transform
def test_shardings_on_eight_devices(transform, axis_type):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
    specs = {"dense": {"kernel": PartitionSpec("rows"), "bias": PartitionSpec()}}
    placed = jax.device_put(dense_params(), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    with jax.set_mesh(mesh):
        masks = jax.jit(make)(placed)
        params = jax.jit(apply_masks)(placed, masks)
        result = scan(transform, TRANSFORMS[transform](optax.adam(0.1), masks), params, masks)
    assert_positive_zeros(result.kernels, result.keep)
    assert len(params["dense"]["kernel"].sharding.device_set) == 8
    for before, after in zip(
        jax.tree.leaves((result.params, result.state)),
        jax.tree.leaves((result.final_params, result.final_state)),
        strict=True,
    ):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
    if transform in WITH_MASKS:
        kernel = masks_in(result.final_state)["dense"]["kernel"]
        assert kernel.sharding.is_equivalent_to(params["dense"]["kernel"].sharding, 2)


@pytest.mark.slow
@every_transform
def test_remat_and_gradient_accumulation(transform):
    params, masks = pruned_params()
    batches = jax.random.normal(jax.random.key(1), (4, 5, 8))

    def batch_loss(params: Any, batch: jax.Array) -> jax.Array:
        layer = apply_masks(params, masks)["dense"]
        return jnp.mean((jnp.tanh(batch @ layer["kernel"] + layer["bias"][None]) - 1.0) ** 2)

    def accumulated(loss: Any, params: Any) -> Any:
        def add(total: Any, batch: jax.Array) -> Any:
            return optax.tree.add(total, jax.grad(loss)(params, batch)), None

        return jax.lax.scan(add, optax.tree.zeros_like(params), batches)[0]

    tx = TRANSFORMS[transform](optax.adam(0.1), masks)
    plain, remat = (
        scan(transform, tx, params, masks, functools.partial(accumulated, fn))
        for fn in (batch_loss, jax.checkpoint(batch_loss))
    )
    assert_positive_zeros(remat.kernels, remat.keep)
    chex.assert_trees_all_close(remat.final_params, plain.final_params, atol=1e-6)


@every_transform
def test_linen_train_state(transform):
    params, masks = pruned_params()
    tx = TRANSFORMS[transform](optax.adam(0.1), masks)
    held = held_masks(transform, masks)
    start = TrainState.create(apply_fn=nn.Dense(3).apply, params=params, tx=tx)

    def body(state: TrainState, _: None) -> Any:
        x = jnp.ones((1, 8))
        grads = jax.grad(lambda p: jnp.sum(state.apply_fn({"params": p["dense"]}, x) ** 2))(state.params)
        state = state.apply_gradients(grads=grads)
        return state, (state.params["dense"]["kernel"], held(state.opt_state)["dense"]["kernel"])

    end, history = jax.jit(lambda state: jax.lax.scan(body, state, length=STEPS))(start)
    assert_positive_zeros(*history)
    assert int(end.step) == STEPS


class Model(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(8, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


@every_transform
def test_nnx_optimizer(transform):
    model = Model()
    masks = make(nnx.state(model, nnx.Param))
    nnx.update(model, apply_masks(nnx.state(model, nnx.Param), masks))
    optimizer = nnx.Optimizer(model, TRANSFORMS[transform](optax.adam(0.1), masks), wrt=nnx.Param)

    traces = []

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        traces.append(None)
        grads = nnx.grad(lambda model: jnp.sum((model(jnp.ones((1, 8))) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
        return model.dense.kernel[...]

    held, history = held_masks(transform, masks), []
    for _ in range(3):
        kernel = step(model, optimizer)
        history.append((np.array(kernel), np.array(held(optimizer.opt_state)["dense"]["kernel"][...])))
    assert_positive_zeros(*map(np.stack, zip(*history, strict=True)))
    assert len(traces) == 1
