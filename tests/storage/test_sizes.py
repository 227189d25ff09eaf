"""What a pruned model costs: counts by hand and against the files that are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import rules

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": jnp.asarray(RNG.normal(size=(3, 3, 2, 9)), jnp.float32), "bias": jnp.ones(9)},
    "dense": {"kernel": jnp.asarray(RNG.normal(size=(40, 17)), jnp.bfloat16)},
    "whole": {"kernel": jnp.ones((2, 2), jnp.float16)},
}
MASKS = jaxprune.make_masks(
    PARAMS, {"conv": 0.5, "dense": 0.9, "whole": 0.0}, rule=rules.layer_sparsity
)  # fmt: skip


def test_count_kept_of_prunable_leaves_alone():
    assert jaxprune.algebra.count_kept(MASKS) == 81 + 68 + 4
    assert jaxprune.algebra.count_kept(MASKS, prunable=lambda path, leaf: True) == 81 + 68 + 4 + 9
    assert isinstance(jaxprune.algebra.count_kept(MASKS), int)


def test_a_traced_mask_is_not_counted():
    with pytest.raises(ValueError, match=r"count_kept reads the values of masks\['conv'\].*, which are traced"):
        jax.jit(jaxprune.algebra.count_kept)(MASKS)


def test_stored_bytes_are_those_of_the_file(tmp_path):
    saved = jaxprune.save_sparse(tmp_path / "model.safetensors", PARAMS, MASKS)
    assert jaxprune.storage.stored_bytes(PARAMS, MASKS) == sum(tensor.stored_bytes for tensor in saved.tensors)
    rows = {row.path: row for row in jaxprune.summarize(PARAMS, MASKS).rows}
    for tensor in saved.tensors:
        assert rows[tensor.path].stored_bytes == tensor.stored_bytes
        assert rows[tensor.path].dense_bytes == tensor.dense_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bytes_are_nearly_those_of_the_file(tmp_path, bits):
    saved = jaxprune.save_sparse(tmp_path / "model.safetensors", PARAMS, MASKS, quantize=bits)
    by_name = {tensor.path: tensor.stored_bytes for tensor in saved.tensors}
    for name in ("conv", "dense"):
        part = jaxprune.storage.stored_bytes(PARAMS[name], MASKS[name], bits=bits)
        stored = by_name[f"{name}/kernel"] + (by_name["conv/bias"] if name == "conv" else 0)
        assert part == pytest.approx(stored, rel=0.1)
