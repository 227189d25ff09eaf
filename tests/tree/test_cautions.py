"""Trees in which the default choice of leaves is likely not what is meant: whoever passes them is told."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune
from jaxprune import rules

PARAMS = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
IN_OPTIMIZER = "holds the state of an optimizer, which is pruned like the parameters"


class Both(nnx.Module):
    def __init__(self, rngs):
        self.model = nnx.Linear(4, 3, rngs=rngs)
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)


def train_state():
    return TrainState.create(apply_fn=nn.Dense(3).apply, params=PARAMS, tx=optax.adam(1e-3))


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (train_state, r"2 leaves, params\.opt_state\[0\]\.mu\['dense'\]\['kernel'\] the first"),
        (lambda: TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1, 0.9)), r"1 leaves, .*\.trace"),
        (lambda: optax.adam(1e-3).init(PARAMS), r"2 leaves, params\[0\]\.mu\['dense'\]\['kernel'\]"),
        (lambda: optax.sgd(0.1, 0.9).init(PARAMS), r"1 leaves, params\[0\]\.trace"),
        (lambda: (PARAMS, optax.lion(1e-3).init(PARAMS)), r"1 leaves, params\[1\]\[0\]\.mu"),
        (lambda: (PARAMS, optax.adamw(1e-3).init(PARAMS)), r"2 leaves, params\[1\]\[0\]\.mu"),
        (
            lambda: nnx.state(nnx.Optimizer(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)),
            "2 leaves",
        ),
        (lambda: nnx.state(Both(nnx.Rngs(0))), r"2 leaves, params\['optimizer'\]"),
        (lambda: {"opt_state.0.mu.dense.kernel": jnp.ones((4, 3))}, "1 leaves"),
    ],
)
def test_the_state_of_an_optimizer_is_no_parameter(make, first):
    with pytest.warns(UserWarning, match=f"params {IN_OPTIMIZER}.*{first}.*Pass the parameters alone"):
        masks = jaxprune.make_masks(make(), 0.5, rule=rules.layer_sparsity)
    with pytest.warns(UserWarning, match=f"masks {IN_OPTIMIZER}"):
        jaxprune.sparsity(masks)


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        # The two heads of a variational autoencoder.
        {"encoder": {"mu": {"kernel": jnp.ones((4, 3))}, "logvar": {"kernel": jnp.ones((4, 3))}}},
        [jnp.ones((4, 3))],
        jnp.ones((4, 3)),
        {"0": jnp.ones((4, 3)), "b": jnp.ones(3)},
    ],
    ids=["names", "autoencoder", "one array in a list", "one array", "a name among numbers"],
)
def test_parameters_are_taken_without_a_warning(params):
    jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)


def test_who_says_what_is_pruned_is_not_warned():
    masks = jaxprune.make_masks(train_state(), 0.5, rule=rules.layer_sparsity, prunable="params")
    assert masks.opt_state[0].mu["dense"]["kernel"].all()
    sites = jaxprune.find_sites(
        lambda params, x: x @ params[1][0] @ params[0], [jnp.ones((3, 4)), (jnp.ones((4, 3)),)], jnp.ones((1, 4))
    )
    jaxprune.make_masks([jnp.ones((3, 4)), (jnp.ones((4, 3)),)], 0.5, rule=rules.layer_sparsity, sites=sites)


@pytest.mark.parametrize(
    "params", [[jnp.ones((4, 3)), jnp.ones(3)], [(jnp.ones((4, 3)), jnp.ones(3)), (jnp.ones((3, 1)), jnp.ones(1))]]
)
def test_a_list_without_names_is_warned_of_once_where_it_is_passed(params):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            jax.jit(lambda params: jaxprune.make_masks(params, 0.5))(params)
            jaxprune.make_masks(params, 0.5)
    assert [warning.filename for warning in found] == [__file__] * 2  # a line each
    assert "params has no names" in str(found[0].message)
