"""Integers that weights were rounded to already: stored as they are, packed, read back bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import jaxprune
from jaxprune import oneshot
from jaxprune.storage import _quantize
from tests.support import oracles_oneshot as oracles
from tests.support.oneshot_problems import one
from tests.support.slow import slow_but


def problem(dtype=jnp.float32):
    weights, gram = oracles.problem(32, 20, seed=1)
    return one(jnp.asarray(weights, dtype), gram)


# bits, group_size, symmetric, the dtype of the weights
KINDS = {
    "int8": (8, None, True, jnp.float32),
    "int8, asymmetric": (8, 16, False, jnp.float32),
    "int4": (4, 8, True, jnp.bfloat16),
    "int4, asymmetric": (4, 8, False, jnp.float32),
    "int3": (3, 16, True, jnp.float32),
    "int3, asymmetric": (3, 16, False, jnp.bfloat16),
    "int2": (2, 16, False, jnp.float32),
    "int6": (6, 16, True, jnp.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", slow_but(["int3, asymmetric"], KINDS))
def test_what_is_loaded_is_what_was_found(name, compress, tmp_path):
    bits, group_size, symmetric, dtype = KINDS[name]
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    for found in (
        oneshot.prune_and_quantize(*problem(dtype), 0.6, **options),
        oneshot.gptq(*problem(dtype), **options),
    ):
        file = tmp_path / "model.safetensors"
        saved = jaxprune.save_sparse(file, found.params, found.masks, codes=found.codes, compress=compress, force=True)
        params, masks = jaxprune.load_sparse(file, like=found.params)
        np.testing.assert_array_equal(params["a"]["kernel"], found.params["a"]["kernel"])
        np.testing.assert_array_equal(masks["a"]["kernel"], found.masks["a"]["kernel"])
        (row,) = saved.tensors
        assert (row.bits, row.largest_error) == (bits if bits <= 4 else 8, 0.0)


@pytest.mark.slow
def test_three_bits_take_three_eighths_of_a_byte(tmp_path):
    weights, gram = oracles.problem(256, 64, seed=1)
    found = oneshot.gptq(*one(weights, gram), bits=3, group_size=64)
    saved = jaxprune.save_sparse(tmp_path / "model.safetensors", found.params, codes=found.codes)
    codes, scales, shape, bits = 256 * 64 * 3 // 8, 4 * 64 * 4, 2 * 8, 1
    assert saved.tensors[0].stored_bytes == codes + scales + shape + bits


@pytest.mark.slow
def test_other_leaves_are_stored_as_the_other_arguments_say(tmp_path):
    params, grams = problem()
    params["b"] = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    found = oneshot.gptq(params, grams, bits=3, prunable="a/kernel")
    saved = jaxprune.save_sparse(tmp_path / "model.safetensors", found.params, codes=found.codes, quantize=4)
    assert [(row.path, row.bits) for row in saved.tensors] == [("a/kernel", 3), ("b/kernel", 4)]


@given(st.data(), st.sampled_from([2, 3, 4]))
def test_packing_is_undone(data, bits):
    limits = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = data.draw(arrays.arrays(np.int8, st.integers(0, 70), elements=limits))
    packed = _quantize.pack(codes, bits)
    assert packed.size == _quantize.packed_size(codes.size, bits)
    np.testing.assert_array_equal(_quantize.unpack(packed, codes.size, bits), codes)


def test_packing_goes_piece_by_piece(monkeypatch):
    codes = np.random.default_rng(0).integers(-4, 4, 1000).astype(np.int8)
    whole = _quantize.pack(codes, 3)
    monkeypatch.setattr(_quantize, "_PIECE", 64)
    np.testing.assert_array_equal(_quantize.pack(codes, 3), whole)
    np.testing.assert_array_equal(_quantize.unpack(whole, 1000, 3), codes)


def test_three_bits_are_a_string_of_bits_with_the_lowest_first():
    # 1 = 001, -1 = 111, 2 = 010: the bits 100 111 010 from the lowest on.
    assert _quantize.pack(np.array([1, -1, 2], np.int8), 3).tolist() == [0b10_111_001, 0]


def refused(codes, match, tmp_path, found, masks=None):
    with pytest.raises(ValueError, match=match):
        jaxprune.save_sparse(tmp_path / "model.safetensors", found.params, masks, codes=codes)
    assert list(tmp_path.iterdir()) == []


def test_codes_that_do_not_fit_are_refused(tmp_path):
    found = oneshot.prune_and_quantize(*problem(), 0.5)
    (codes,) = found.codes.values()
    refused({"b/kernel": codes}, r"codes has for 'b/kernel' .* and params a/kernel", tmp_path, found)
    refused({"a/kernel": 3}, r"codes has for 'a/kernel' 3", tmp_path, found)
    short = dataclasses.replace(codes, codes=codes.codes[:16])
    refused({"a/kernel": short}, r"integers of shape \(16, 20\); the leaf has \(32, 20\)", tmp_path, found)
    other = jax.tree.map(jnp.zeros_like, found.masks)
    refused(found.codes, r"codes of params\['a'\]\['kernel'\] keep weights that masks prune", tmp_path, found, other)


def test_scales_that_the_dtype_of_the_leaf_cannot_hold_are_refused(tmp_path):
    found = oneshot.gptq(*problem(jnp.float8_e4m3fn), group_size=8)
    refused(
        found.codes, r"codes of params\['a'\]\['kernel'\] have scales that float8_e4m3fn cannot hold", tmp_path, found
    )
