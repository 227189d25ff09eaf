"""Two of every four weights: places by hand, the layouts of tensor cores by their definitions, and back."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxprune
from jaxprune import export, rules

# Which of four are kept -> the two places, by hand.
PLACES = {
    "....": (2, 3), "x...": (0, 2), ".x..": (1, 2), "..x.": (2, 3), "...x": (2, 3), "xx..": (0, 1),
    "x.x.": (0, 2), "x..x": (0, 3), ".xx.": (1, 2), ".x.x": (1, 3), "..xx": (2, 3),
}  # fmt: skip


@pytest.mark.parametrize("kept", PLACES)
def test_places_of_each_pattern(kept):
    mask, kernel = np.array([[mark == "x"] for mark in kept]), np.array([[1.0], [2.0], [3.0], [4.0]])
    found = export.to_two_four(kernel, mask)
    assert tuple(found.indices.ravel()) == PLACES[kept]
    assert found.values.ravel().tolist() == [kernel[i, 0] if mask[i, 0] else 0.0 for i in PLACES[kept]]
    np.testing.assert_array_equal(found.dense(), np.where(mask, kernel, 0))


def pruned(inputs, outputs, dtype=np.float32, seed=0, stack=()):
    """A kernel with two of every four inputs, and here and there fewer."""
    rng = np.random.default_rng(seed)
    kernel = rng.integers(1, 100, (*stack, inputs, outputs)).astype(dtype)
    ranks = rng.random((*stack, inputs // 4, 4, outputs)).argsort(axis=-2).argsort(axis=-2)
    mask = (ranks < 2).reshape(kernel.shape) & (rng.random(kernel.shape) < 0.9)
    return kernel, mask


def test_a_stack_is_taken_apart_and_put_together_again():
    kernel, mask = pruned(12, 5, ml_dtypes.bfloat16, stack=(3, 2))
    found = export.to_two_four(kernel, mask)
    assert (found.values.shape, found.indices.shape) == ((3, 2, 5, 6), (3, 2, 5, 3, 2))
    assert (found.values.dtype, found.indices.dtype) == (kernel.dtype, np.uint8)
    np.testing.assert_array_equal(found.dense(), np.where(mask, kernel, 0))


def test_what_the_rule_keeps_is_what_is_taken_apart():
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 8))}
    masks = jaxprune.make_masks(params, 2, rule=rules.n_m(4))
    found = export.to_two_four(params["kernel"], masks["kernel"])
    assert np.all(found.values != 0)
    np.testing.assert_array_equal(found.dense(), jaxprune.apply_masks(params, masks)["kernel"])


def by_definition(indices: np.ndarray, bits: int) -> np.ndarray:
    """Words of the metadata, moved as CUTLASS' reorder_meta and its layout of interleaved columns say, one by one."""
    outputs, fours, _ = indices.shape
    columns = fours * 4 // bits
    flat = np.zeros(outputs * columns, np.int64)
    group, interweave = (32, 4) if bits == 16 else (16, 2)
    for row, column in itertools.product(range(outputs), range(columns)):
        quads = indices[row, column * bits // 4 : (column + 1) * bits // 4].astype(int)
        word = sum((first + 4 * second) << (4 * i) for i, (first, second) in enumerate(quads))
        to_row = row // group * group + row % 8 * interweave + row % group // 8
        to_column = column
        if to_row % 2 == 0 and column % 2 == 1:
            to_row, to_column = to_row + 1, column - 1
        elif to_row % 2 == 1 and column % 2 == 0:
            to_row, to_column = to_row - 1, column + 1
        flat[to_column // 2 * outputs * 2 + to_row * 2 + to_column % 2] = word
    return flat.reshape(outputs, columns)


@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs"),
    [(np.float16, 96, 64), (ml_dtypes.bfloat16, 32, 32), (np.int8, 128, 48)],
)
def test_cutlass_by_its_definition_and_back(dtype, inputs, outputs):
    sparse = export.to_two_four(*pruned(inputs, outputs, dtype))
    metadata = export.pack_cutlass(sparse)
    bits = 32 if dtype is np.int8 else 16
    assert metadata.dtype == np.dtype(f"int{bits}")
    np.testing.assert_array_equal(metadata.view(f"uint{bits}"), by_definition(sparse.indices, bits))
    back = export.unpack_cutlass(sparse.values, metadata)
    np.testing.assert_array_equal(back.indices, sparse.indices)
    np.testing.assert_array_equal(back.dense(), sparse.dense())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8])
def test_tcgen05_as_pallas_formats_it_and_back(dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    sparse = export.to_two_four(*pruned(256, 384, dtype))
    metadata = export.pack_tcgen05(sparse)
    theirs = plgpu.format_tcgen05_sparse_metadata(jnp.asarray(sparse.indices.astype(ml_dtypes.uint2)), jnp.dtype(dtype))
    assert (metadata.dtype, metadata.shape) == (theirs.dtype, theirs.shape) == (ml_dtypes.uint2, (3, 2, 128, 64))
    np.testing.assert_array_equal(metadata.astype(np.uint8), np.asarray(theirs).astype(np.uint8))
    back = export.unpack_tcgen05(sparse.values, metadata)
    np.testing.assert_array_equal(back.indices, sparse.indices)


def test_a_group_that_keeps_more_is_named():
    mask = np.zeros((2, 8, 3), bool)
    mask[1, 4:7, 2] = True
    with pytest.raises(
        ValueError,
        match=r"mask keeps 3 of the inputs 4 to 7 of output 2 of layer 1, not two at most. Make it by rule=rules.n_m\(4\) with k",
    ):
        export.to_two_four(np.ones(mask.shape), mask)


def test_shapes_and_dtypes_that_no_layout_has_are_refused():
    with pytest.raises(ValueError, match=r"inputs in fours; got \(6, 3\)"):
        export.to_two_four(np.ones((6, 3)), np.ones((6, 3), bool))
    with pytest.raises(ValueError, match=r"The mask of \[8, 3\] is bool and of its shape, not float64\[8, 3\]"):
        export.to_two_four(np.ones((8, 3)), np.ones((8, 3)))
    half, single = (export.to_two_four(*pruned(32, 32, dtype)) for dtype in (np.float16, np.float32))
    with pytest.raises(ValueError, match=r"CUTLASS takes 2:4 in float16, bfloat16 and int8, not in float32"):
        export.pack_cutlass(single)
    with pytest.raises(ValueError, match=r"outputs a multiple of 32 and inputs of 32; got \(31, 16\)"):
        export.pack_cutlass(export.TwoFour(half.values[:31], half.indices[:31]))
    with pytest.raises(ValueError, match=r"outputs a multiple of 128 and inputs of 128; got \(32, 16\)"):
        export.pack_tcgen05(half)
    with pytest.raises(ValueError, match=r"tcgen05 takes 2:4 in dtypes of 8 and 16 bits, not in float32"):
        export.pack_tcgen05(export.to_two_four(*pruned(128, 128)))


def test_metadata_of_other_values_are_refused():
    half = export.to_two_four(*pruned(128, 128, np.float16))
    metadata = export.pack_cutlass(half)
    with pytest.raises(ValueError, match=r"float16\[128, 64\] go with int16\[128, 8\]; got"):
        export.unpack_cutlass(half.values, metadata[:64])
    with pytest.raises(ValueError, match=r"for the inputs 0 to 3 of output 0 no two places"):
        export.unpack_cutlass(half.values, np.zeros_like(metadata))
    with pytest.raises(ValueError, match=r"float16\[128, 64\] go with uint2\[1, 1, 128, 64\]; got"):
        export.unpack_tcgen05(half.values, metadata)
