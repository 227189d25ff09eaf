"""Masks through quantisation after and during training, and through adapters: no zero is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from qwix.contrib import gptq

import jaxprune
from jaxprune import rules, transforms
from tests.interop.qwix.models import (
    QTYPES,
    Linen,
    Nnx,
    X,
    dequantize,
    from_nnx,
    is_quantized,
    lost_zeros,
    provider,
    pruned,
    quantize,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax, by qwix


@pytest.mark.parametrize("kind", QTYPES)
def test_zeros_stay_in_linen(kind):
    params, zeroed, masks = pruned()
    model, found = quantize(zeroed, **QTYPES[kind])
    numbers = dequantize(found)
    assert lost_zeros(numbers, masks) == 0
    if "asymmetric" not in kind and "tiled" not in kind:  # where the largest of each scale stays, so do the others
        dense = dequantize(quantize(params, **QTYPES[kind])[1])
        for name in ("a", "b"):
            kept = np.asarray(masks[name]["kernel"])
            np.testing.assert_array_equal(numbers[name]["kernel"][kept], dense[name]["kernel"][kept])
    np.testing.assert_allclose(
        model.apply({"params": found}, X), Linen().apply({"params": numbers}, X), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["int8", "int4, tiled"])
def test_zeros_stay_in_nnx(kind):
    model = Nnx(nnx.Rngs(0))
    params = from_nnx(model)
    masks = jaxprune.make_masks(params, 0.7, rule=rules.layer_sparsity)
    nnx.update(model, jaxprune.apply_masks(params, masks))
    found = qwix.quantize_model(model, provider(**QTYPES[kind]), X)
    for name in ("a", "b"):
        weight = qwix.dequantize(getattr(found, name).kernel.array)
        assert lost_zeros(weight, masks[name]["kernel"]) == 0


def test_zeros_stay_in_training_that_rounds():
    _, params, masks = pruned()
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(Linen(), qwix.QtProvider([rule]))
    tx = optax.chain(optax.adamw(1e-2), jaxprune.keep_pruned(masks))
    target = jax.random.normal(jax.random.key(2), (16, 16))

    @jax.jit
    def step(params, state):
        loss = lambda params: jnp.mean((model.apply({"params": params}, X) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(float(value))
        assert lost_zeros(params, masks) == 0
    assert losses[-1] < losses[0]
    for kind in ("int8", "int4, tiled"):
        assert lost_zeros(dequantize(quantize(params, **QTYPES[kind])[1]), masks) == 0


RANK, ALPHA = 4, 8.0


def adapted(**how):
    """A model with adapters, and its parameters after three steps of the adapters alone, from pruned weights."""
    _, zeroed, masks = pruned()
    model = qwix.apply_lora_to_model(Linen(), qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA, **how))
    params = model.init(jax.random.key(3), X)["params"]
    base = quantize(zeroed, **how)[1] if how else zeroed
    params = {name: params[name] | base[name] for name in params}
    adapters = {
        module: {name: leaf for name, leaf in leaves.items() if "_lora_" in name} for module, leaves in params.items()
    }
    frozen = {
        module: {name: leaf for name, leaf in leaves.items() if "_lora_" not in name}
        for module, leaves in params.items()
    }
    target, tx = jax.random.normal(jax.random.key(2), (16, 16)), optax.adam(1e-2)

    def loss(adapters):
        whole = {module: frozen[module] | adapters[module] for module in frozen}
        return jnp.mean((model.apply({"params": whole}, X) - target) ** 2)

    state = tx.init(adapters)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    return frozen, adapters, masks


@pytest.mark.parametrize(
    "how", [{}, QTYPES["nf4"] | {"tile_size": 16}, QTYPES["int4, tiled"]], ids=["lora", "qlora nf4", "qlora int4"]
)
def test_adapters_are_merged_under_the_mask(how):
    frozen, adapters, masks = adapted(**how)
    merged = dequantize(frozen)
    for name in ("a", "b"):
        a, b, mask = adapters[name]["kernel_lora_a"], adapters[name]["kernel_lora_b"], masks[name]["kernel"]
        assert np.any(b != 0)
        dense = np.asarray(merged[name]["kernel"] + ALPHA / RANK * a @ b)
        merged[name]["kernel"] = transforms.merge_lora(merged[name]["kernel"], a, b, mask, scale=ALPHA / RANK)
        np.testing.assert_allclose(merged[name]["kernel"], np.where(mask, dense, 0), rtol=1e-5, atol=1e-6)
    assert lost_zeros(merged, masks) == 0
    if how:
        assert lost_zeros(dequantize(quantize(merged, **how)[1]), masks) == 0


def calibrated():
    """Variables with the statistics of qwix's own GPTQ."""
    model = qwix.quantize_model(
        Linen(), gptq.GptqCalibrationProvider([gptq.GptqRule(module_path=".*", weight_qtype="int8")])
    )
    variables = Linen().init(jax.random.key(1), X)
    return variables | model.apply(variables, X, mutable="quant_stats")[1]


def lora_nnx(**how):
    return qwix.apply_lora_to_model(
        Nnx(nnx.Rngs(0)), qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0, **how), X, rngs=nnx.Rngs(1)
    )


TREES = {
    **{f"linen, {kind}": lambda how=how: quantize(pruned()[1], **how)[1] for kind, how in QTYPES.items()},
    "linen, fp8 with a code of zero": lambda: {
        "kernel": qwix.QArray(jnp.ones((8, 4), jnp.float8_e4m3fn), jnp.ones((2, 4)), jnp.ones((2, 4), jnp.float8_e4m3fn))
    },
    "linen, adapters": lambda: qwix.apply_lora_to_model(
        Linen(), qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0)
    ).init(jax.random.key(1), X)["params"],
    "linen, statistics": calibrated,
    "nnx, int8": lambda: nnx.state(qwix.quantize_model(Nnx(nnx.Rngs(0)), provider(weight_qtype="int8"), X), nnx.Param),
    "nnx, dicts": lambda: from_nnx(qwix.quantize_model(Nnx(nnx.Rngs(0)), provider(weight_qtype="int4", tile_size=16), X)),
    "nnx, adapters": lambda: nnx.state(lora_nnx(), nnx.Param),
    "nnx, adapters of int4": lambda: nnx.state(lora_nnx(weight_qtype="int4", tile_size=16), nnx.Param),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_only_kernels_of_numbers_are_pruned(name):
    """Never integers, nor scales, codes of zero, adapters or statistics; and beside them a kernel as ever."""
    tree = {"model": TREES[name](), "more": {"kernel": jnp.ones((8, 4))}}
    masks = jaxprune.make_masks(tree, 0.5, rule=rules.layer_sparsity)
    taken = {
        jax.tree_util.keystr(path) for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0] if not np.all(mask)
    }
    assert "['more']['kernel']" in taken
    for words in ("scale", "zero_point", "qvalue", "lora", "hessian"):
        assert not any(words in path for path in taken), taken
    floats = {"linen, adapters": 2, "linen, statistics": 2, "nnx, adapters": 2}
    assert len(taken) == 1 + floats.get(name, 0)


def test_a_quantised_tree_alone_has_nothing_to_prune():
    with pytest.raises(ValueError, match=r"No leaf is prunable. Found .*qvalue"):
        jaxprune.make_masks(quantize(pruned()[1], weight_qtype="float8_e4m3fn")[1], 0.5, rule=rules.layer_sparsity)
    assert is_quantized(quantize(pruned()[1], weight_qtype="int8")[1]["a"]["kernel"])
