"""The mistakes of a first hour: each message says what was given, where, and what to do instead."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxprune
from jaxprune import find_sites, make_masks, oneshot, rules, scores, search_k, sensitivity, structured

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
Y = jnp.zeros(8, jnp.int32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(hidden)


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


# Keras is no dependency of the tests; its models are told by the name of their class and of its module alone.
class Layer:
    __module__ = "keras.src.layers.layer"

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Sequential(Layer):
    pass


MODEL = Linen()
VARIABLES = MODEL.init(jax.random.key(0), X)
PARAMS = VARIABLES["params"]
BOUND = MODEL.bind(VARIABLES)
MODULE = NNX(nnx.Rngs(0))
MASKS = make_masks(PARAMS, 0.5)
make = functools.partial(make_masks, rule=rules.layer_sparsity)


def apply(params: Any, x: jax.Array) -> jax.Array:
    return MODEL.apply({"params": params}, x)


def size(params: Any) -> float:
    return float(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params)))


NORMS = jaxprune.calibrate_norms(apply, PARAMS, [X])
GRAMS = jaxprune.calibrate_grams(apply, PARAMS, [X])
GRAPH = structured.trace(apply, PARAMS, X)
PLAN = structured.select_channels(GRAPH, PARAMS, 0.5)


def calibrate(fn: Any, params: Any, x: Any) -> Any:
    return jaxprune.calibrate_norms(fn, params, [x])


def mapped(params: Any, x: jax.Array) -> jax.Array:
    return jax.pmap(lambda x: apply(params, x))(x)


def raises(error: type[Exception], words: list[str], call: Callable[[], Any]) -> None:
    with pytest.raises(error) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, str(raised.value)


FACTORIES = {
    "n_m": rules.n_m,
    "channels": rules.channels,
    "blocks": rules.blocks,
    "partial": functools.partial(rules.n_m, axis=0),
}
WITH_A_RULE = {
    "make_masks": lambda rule: make_masks(PARAMS, 2, rule=rule),
    "search_k": lambda rule: search_k(size, PARAMS, max_drop=1.0, rule=rule),
    "sensitivity": lambda rule: sensitivity(size, PARAMS, [0.5], rule=rule),
    "sparsegpt": lambda rule: oneshot.sparsegpt(PARAMS, GRAMS, 2, rule=rule),
    "admm": lambda rule: oneshot.admm(PARAMS, GRAMS, 2, rule=rule),
    "channels": lambda rule: rules.channels(rule),
}


@pytest.mark.parametrize("call", WITH_A_RULE.values(), ids=WITH_A_RULE)
def test_a_rule_uncalled_or_a_string(call: Callable[[Any], Any]) -> None:
    for rule in FACTORIES.values():
        name = getattr(rule, "__name__", "n_m")
        raises(
            TypeError, [f"{name} makes a rule and is none itself", "rule=rules.n_m(4)"], lambda rule=rule: call(rule)
        )
    raises(TypeError, ["the string 'global_sparsity'", "rule=rules.global_sparsity"], lambda: call("global_sparsity"))
    raises(TypeError, ["the string '2:4'", "rules.n_m(4)"], lambda: call("2:4"))
    raises(TypeError, ["(scores, k) -> masks, not None"], lambda: call(None))


def test_a_rule_of_ones_own_is_still_a_rule() -> None:
    def all_kept(scores: Any, k: Any) -> Any:
        return jax.tree.map(lambda score: score >= 0, scores)

    assert jax.tree.all(jax.tree.map(jnp.all, make_masks(PARAMS, 0.5, rule=all_kept)))


READERS = {"find_sites": find_sites, "trace": structured.trace, "calibrate_norms": calibrate}
FUNCTIONS = {
    "bare params": (MODEL.apply, PARAMS, ["takes variables", 'model.apply({"params": params}, x)']),
    "bare params within": (lambda p, x: MODEL.apply(p, x), PARAMS, ["takes variables", 'apply({"params": params}, x)']),
    "one layer": (nn.Dense(2).apply, PARAMS["Dense_0"], ["takes variables", 'model.apply({"params": params}, x)']),
    "a bound module": (BOUND, PARAMS, ["fn is a Linen module", 'model.apply({"params": params}, x)']),
    "a Linen module": (MODEL, PARAMS, ["fn is a Linen module", 'model.apply({"params": params}, x)']),
    "a Linen module within": (lambda p, x: MODEL(x), PARAMS, ["calls a Linen module", 'apply({"params": params}, x)']),
    "an NNX module": (MODULE, nnx.state(MODULE), ["fn is an NNX module", "lambda model, x: model(x)", "as params"]),
    "a Keras model": (Sequential(), PARAMS, ["fn is a Keras model", "model.stateless_call(", "v.path: v.value"]),
    "a name": ("apply", PARAMS, ["fn is the string 'apply'", "The function comes first"]),
    "Linen as params": (MODEL.apply, MODEL, ["params is a Linen module", 'variables["params"]', "init"]),
    "bound as params": (apply, BOUND, ["params is a Linen module", "bound.unbind()", 'variables["params"]']),
    "Keras as params": (apply, Sequential(), ["params is a Keras model", "{v.path: v.value for v in model."]),
    "swapped": (
        PARAMS,
        apply,
        ["params is the function apply", "The function comes first", "find_sites(fn, params, x)"],
    ),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("fn", "params", "words"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_that_is_none_of_parameters(reader: Callable, fn: Any, params: Any, words: list[str]) -> None:
    raises(TypeError, words, lambda: reader(fn, params, X))


MODELS = {
    "Linen": (MODEL, ["a Linen module", 'variables["params"]']),
    "bound": (BOUND, ["a Linen module", "bound.unbind()"]),
    "Keras": (Sequential(), ["a Keras model", "{v.path: v.value for v in model.trainable_variables}"]),
}


@pytest.mark.parametrize(("model", "words"), MODELS.values(), ids=MODELS)
def test_a_model_as_params_without_a_function(model: Any, words: list[str]) -> None:
    for call in (lambda: make_masks(model, 0.5), lambda: jaxprune.apply_masks(model, MASKS)):
        raises(TypeError, ["params is ", "not an array", *words], call)


def test_an_nnx_module_is_a_tree_of_parameters() -> None:
    """Its masks are those of its state, in a module."""
    masks, expected = make_masks(MODULE, 0.5), make_masks(nnx.state(MODULE, nnx.Param), 0.5)
    assert isinstance(masks, NNX)
    np.testing.assert_array_equal(masks.first.kernel[...], expected["first"]["kernel"][...])
    pruned = jaxprune.apply_masks(MODULE, masks)
    assert int(jnp.sum(pruned.first.kernel[...] == 0)) == int(jnp.sum(~expected["first"]["kernel"][...]))
    assert len(find_sites(lambda model, x: model(x), MODULE, X)) == 2


CALIBRATED = {
    "norms": lambda batches: jaxprune.calibrate_norms(apply, PARAMS, batches),
    "grams": lambda batches: jaxprune.calibrate_grams(apply, PARAMS, batches),
    "sequential": lambda batches: oneshot.sequential(apply, PARAMS, batches, lambda p, g: oneshot.sparsegpt(p, g, 0.5)),
}


@pytest.mark.parametrize("call", CALIBRATED.values(), ids=CALIBRATED)
def test_batches(call: Callable[[Any], Any]) -> None:
    raises(
        TypeError, ["fn is apply(params", "with 2 inputs", "tuple", "[x for x, y in batches]"], lambda: call([(X, Y)])
    )
    raises(TypeError, ["batches is a dict", "[batch]"], lambda: call({"image": X}))
    raises(TypeError, ["batches is None"], lambda: call(None))


def test_inputs_that_are_missing() -> None:
    for call in (find_sites, structured.trace):
        raises(
            TypeError,
            ["fn is apply(params", "with 0 inputs", "functools.partial"],
            lambda call=call: call(apply, PARAMS),
        )


def test_a_type_error_of_the_functions_own_is_left_alone() -> None:
    def broken(params: Any, x: jax.Array) -> jax.Array:
        raise TypeError("of its own")

    for reader in READERS.values():
        with pytest.raises(TypeError, match="^of its own"):
            reader(broken, PARAMS, X)


def test_a_function_that_closes_over_its_parameters() -> None:
    words = ["nothing to calibrate", "uses no parameter of those it is given", "first argument"]
    raises(ValueError, words, lambda: calibrate(lambda params, x: apply(PARAMS, x), PARAMS, X))


@pytest.mark.filterwarnings("ignore::jaxprune.sites.CalibrationWarning")
def test_a_traced_pmap() -> None:
    words = ["jax.pmap", "not looked into", "pass the function that they map"]
    raises(ValueError, ["nothing to calibrate", *words], lambda: calibrate(mapped, PARAMS, X[None]))
    unresolved = [entry.reason for entry in find_sites(mapped, PARAMS, X[None]).unresolved]
    frozen = [reason for axis in structured.trace(mapped, PARAMS, X[None]).frozen for reason in axis.reasons]
    for reasons in (unresolved, frozen):
        assert any(all(word in reason for word in words) for reason in reasons), reasons


SCORES = {
    "a name": ("wanda", ["the string 'wanda'", "scores=scores.wanda(params, ...)"]),
    "a function": (scores.wanda, ["the function wanda", "Call it with params"]),
    "norms": (NORMS, ["scores is Norms", "scores=scores.wanda(params, norms)"]),
    "grams": (GRAMS, ["scores is Grams", "scores=scores.obs(params, grams)", "grams.norms()"]),
}


@pytest.mark.parametrize(("given", "words"), SCORES.values(), ids=SCORES)
def test_scores_that_are_none(given: Any, words: list[str]) -> None:
    for call in (
        lambda: make_masks(PARAMS, 0.5, scores=given),
        lambda: search_k(size, PARAMS, max_drop=1.0, scores=given),
        lambda: sensitivity(size, PARAMS, [0.5], scores=given),
        lambda: structured.select_channels(GRAPH, PARAMS, 0.5, scores=given),
    ):
        raises(TypeError, words, call)


def test_a_norm_by_name() -> None:
    words = ["the string 'l1'", "functools.partial(scores.channel_norm, ord=1)"]
    raises(
        TypeError, ["importance is", *words], lambda: structured.select_channels(GRAPH, PARAMS, 0.5, importance="l1")
    )
    raises(TypeError, ["norm is", *words], lambda: rules.channels(rules.layer_sparsity, norm="l1"))


METRICS = {
    "None": (None, TypeError, ["returned None", "one number", "return?"]),
    "a dict": (
        {"loss": 1.0, "accuracy": 0.5},
        TypeError,
        ["'loss', 'accuracy'", "lambda params: evaluate(params)['loss']"],
    ),
    "text": ("0.9", TypeError, ["the string '0.9'", "one number"]),
    "a pair": ((1.0, 2.0), ValueError, ["shape (2,)", "scalar"]),
}


@pytest.mark.parametrize(("metric", "error", "words"), METRICS.values(), ids=METRICS)
def test_an_evaluate_that_returns_no_number(metric: Any, error: type[Exception], words: list[str]) -> None:
    raises(error, [*words, "the unpruned parameters"], lambda: sensitivity(lambda params: metric, PARAMS, [0.5]))
    raises(error, [*words, "the unpruned parameters"], lambda: search_k(lambda params: metric, PARAMS, max_drop=1.0))


def test_a_metric_that_is_a_loss() -> None:
    def loss(params: Any) -> float:
        return 100 - size(params)

    for call in (lambda: sensitivity(loss, PARAMS, [0.5, 2.0]), lambda: search_k(loss, PARAMS, max_drop=1.0, steps=2)):
        with pytest.warns(UserWarning, match="rises as weights go.*of a loss, evaluate is to return the negative"):
            call()


def test_one_strength_where_several_belong() -> None:
    for ks in (0.5, np.float32(0.5), jnp.float32(0.5)):
        words = ["ks are several strengths", "write ks=["]
        raises(TypeError, words, lambda ks=ks: sensitivity(size, PARAMS, ks))
        raises(TypeError, words, lambda ks=ks: jaxprune.iterate(lambda p, m: p, make, PARAMS, ks))


NEED_GRAMS = {
    "sparsegpt": lambda grams: oneshot.sparsegpt(PARAMS, grams, 0.5),
    "admm": lambda grams: oneshot.admm(PARAMS, grams, 0.5),
    "reconstruct": lambda grams: oneshot.reconstruct(PARAMS, MASKS, grams),
    "scores.obs": lambda grams: scores.obs(PARAMS, grams),
    "repair": lambda grams: structured.repair(PLAN, PARAMS, grams),
    "select_channels": lambda grams: structured.select_channels(GRAPH, PARAMS, 0.5, grams=grams),
    "price_widths": lambda grams: structured.price_widths(GRAPH, PARAMS, grams=grams, squares=PARAMS),
}


@pytest.mark.parametrize("title", NEED_GRAMS)
def test_norms_where_grams_are_needed(title: str) -> None:
    words = [
        f"{title}(",
        "was given Norms where Grams belongs",
        "calibrate_grams(fn, params, batches); norms are their",
    ]
    raises(TypeError, words, lambda: NEED_GRAMS[title](NORMS))
    raises(TypeError, [f"{title}(", "a list where Grams belongs", "calibrate_grams"], lambda: NEED_GRAMS[title]([X]))


def test_grams_where_norms_are_needed() -> None:
    for score in (scores.wanda, scores.ria):
        words = [f"scores.{score.__name__}(params, norms)", "Grams where Norms belongs", "grams.norms()"]
        raises(TypeError, words, lambda score=score: score(PARAMS, GRAMS))
        raises(TypeError, ["calibrate_norms(fn, params, batches)"], lambda score=score: score(PARAMS, [X]))


SWAPPED = {
    "make_masks": (lambda: make_masks(0.5, PARAMS), ["params is one number", "make_masks(params, k)"]),
    "apply_masks": (lambda: jaxprune.apply_masks(MASKS, PARAMS), ["The parameters come first, then their masks"]),
    "summarize": (lambda: jaxprune.summarize(MASKS, PARAMS), ["bool", "the parameters come first, then their masks"]),
    "save_sparse": (lambda: jaxprune.save_sparse(PARAMS, "x", MASKS), ["save_sparse(path, params, masks)", "a dict"]),
    "sensitivity": (lambda: sensitivity(PARAMS, size, [0.5]), ["sensitivity(evaluate, params, ks)", "comes first"]),
    "search_k": (lambda: search_k(PARAMS, size, max_drop=1.0), ["search_k(evaluate, params)", "comes first"]),
    "mean_over_batches": (
        lambda: jaxprune.mean_over_batches(PARAMS, jax.grad(size), [X]),
        ["mean_over_batches(fn, params, batches)", "a dict where fn belongs"],
    ),
    "calibrate": (
        lambda: jaxprune.calibrate_grams(apply, [X], PARAMS),
        ["batches is a dict", "fn, params and batches"],
    ),
    "wanda": (lambda: scores.wanda(NORMS, PARAMS), ["scores.wanda(params, norms)", "a dict where Norms belongs"]),
    "sparsegpt": (lambda: oneshot.sparsegpt(GRAMS, PARAMS, 0.5), ["sparsegpt(params, grams, k)", "a dict"]),
    "sparsegpt k": (lambda: oneshot.sparsegpt(PARAMS, 0.5, GRAMS), ["sparsegpt(params, grams, k)", "given 0.5"]),
    "reconstruct": (lambda: oneshot.reconstruct(PARAMS, GRAMS, MASKS), ["reconstruct(params, masks, grams)", "a dict"]),
    "shrink": (lambda: structured.shrink(PARAMS, PLAN), ["shrink(plan, params)", "a dict where Plan belongs"]),
    "channel_masks": (lambda: structured.channel_masks(PARAMS, PLAN), ["channel_masks(plan, params)", "a dict"]),
    "rebuild": (lambda: structured.rebuild(PLAN, GRAPH), ["rebuild(graph, plan)", "a Plan where Graph belongs"]),
    "verify": (
        lambda: structured.verify(PLAN, GRAPH, PARAMS, X),
        ["verify(graph, plan,", "a Plan where Graph belongs"],
    ),
    "select_channels": (lambda: structured.select_channels(PARAMS, GRAPH, 0.5), ["a dict where Graph", "trace(fn,"]),
    "prune": (lambda: jaxprune.prune(0.5, make), ["prune(make, schedule)", "0.5 for make", "functools.partial"]),
    "prune by a schedule": (
        lambda: jaxprune.prune(optax.constant_schedule(0.5), make),
        ["prune(make, schedule)", "partial for schedule", "takes params and k, comes first"],
    ),
    "rigl": (
        lambda: jaxprune.rigl(MASKS, optax.adam(0.1), until=9),
        ["rigl(inner, masks)", "a dict where the optimizer"],
    ),
}


def test_a_rule_where_a_function_of_parameters_belongs() -> None:
    words = ["rules.layer_sparsity for make", "functools.partial(make_masks, rule=rules.layer_sparsity)"]
    for rule in (rules.layer_sparsity, functools.partial(rules.layer_sparsity, max_sparsity=0.9)):
        raises(TypeError, words, lambda rule=rule: jaxprune.prune(rule, 0.5))
        raises(TypeError, words, lambda rule=rule: jaxprune.iterate(lambda p, m: p, rule, PARAMS, [0.5]))


@pytest.mark.parametrize(("call", "words"), SWAPPED.values(), ids=SWAPPED)
def test_swapped_arguments(call: Callable[[], Any], words: list[str]) -> None:
    raises((TypeError, ValueError), words, call)


def test_an_optimizer_state_without_masks(tmp_path: Path) -> None:
    """What Orbax restores without a target is plain dicts; the message's own remedy brings the masks back."""
    tx = optax.chain(optax.adam(0.1), jaxprune.keep_pruned(MASKS))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tx.init(PARAMS))
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "state")
        state = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    words = ["holds no masks", "opt_state[1]['masks']", "without a target", "jax.eval_shape(tx.init, params)"]
    raises(ValueError, words, lambda: jaxprune.masks_in(plain))
    jax.tree.map(np.testing.assert_array_equal, jaxprune.masks_in(state), MASKS)
    raises(ValueError, ["the transform itself", "init(params)"], lambda: jaxprune.masks_in(tx))
    raises(ValueError, ["keep_pruned(masks) last"], lambda: jaxprune.masks_in(optax.adam(0.1).init(PARAMS)))


FRACTIONS = {
    "layer": lambda k: make_masks(PARAMS, k, rule=rules.layer_sparsity),
    "row": lambda k: make_masks(PARAMS, k, rule=rules.row_sparsity),
    "global": lambda k: make_masks(PARAMS, k, rule=rules.global_sparsity),
    "erk": lambda k: make_masks(PARAMS, k, rule=rules.erk_sparsity),
    "channels": lambda k: make_masks(PARAMS, k, rule=rules.channels(rules.layer_sparsity)),
    "sparsegpt": lambda k: oneshot.sparsegpt(PARAMS, GRAMS, k),
    "prune": lambda k: jaxprune.prune(make, k).init(PARAMS),
    "sensitivity": lambda k: sensitivity(size, PARAMS, [k], rule=rules.layer_sparsity),
    "search_k": lambda k: search_k(size, PARAMS, max_drop=1.0, rule=rules.layer_sparsity, high=k),
}


@pytest.mark.parametrize("call", FRACTIONS.values(), ids=FRACTIONS)
def test_a_percentage_for_a_fraction(call: Callable[[float], Any]) -> None:
    raises(ValueError, ["0 <= k <= 1", "got k = 90", "fraction removed", "90 % is 0.9"], lambda: call(90))


def test_a_percentage_of_channels() -> None:
    raises(
        ValueError,
        ["fraction of channels", "not 50; 50 % is 0.5"],
        lambda: structured.select_channels(GRAPH, PARAMS, 50),
    )


GROUPS = {
    "make_masks": lambda k: make_masks(PARAMS, k, rule=rules.n_m(4)),
    "sparsegpt": lambda k: oneshot.sparsegpt(PARAMS, GRAMS, k, rule=rules.n_m(4)),
    "sensitivity": lambda k: sensitivity(size, PARAMS, [k], rule=rules.n_m(4)),
}


@pytest.mark.parametrize("call", GROUPS.values(), ids=GROUPS)
def test_a_fraction_for_n_of_m(call: Callable[[float], Any]) -> None:
    kept = re.escape("how many of every 4 weights are kept, a whole number")
    with pytest.raises(ValueError, match=rf"rules\.n_m\(4\) takes 1 <= k <= 4.*got k = 0\.9 for .*{kept}"):
        call(0.9)
    with pytest.raises(ValueError, match=rf"takes a whole number, not k = 2\.5.*{kept}"):
        call(2.5)
