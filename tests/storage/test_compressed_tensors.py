"""Files exchanged with the library compressed-tensors: it reads ours, we read its own, byte for byte the same."""

import warnings

import numpy as np
import pytest

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own
    torch = pytest.importorskip("torch", reason="needs torch and compressed-tensors==0.14.*, which pull gigabytes")
    sparse_compressors = pytest.importorskip(
        "compressed_tensors.compressors.sparse_compressors",
        reason="needs compressed-tensors==0.14.*; later releases have no sparse-bitmask",
    )
    from compressed_tensors.compressors.sparse_compressors import sparse_24_bitmask
    from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPES = {"layer.0.weight": (5, 9), "layer.1.weight": (16, 32), "conv.weight": (2, 3, 3, 5), "empty.weight": (3, 8)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def state_dict(dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=generator)
        found[name] = torch.where(weight.abs() > (9 if "empty" in name else 0.8), weight, 0).to(dtype)
    return found | {"layer.0.bias": torch.arange(5).to(dtype)}


def compressor():
    return sparse_compressors.BitmaskCompressor()


def compress(state: dict) -> dict:
    return compressor().compress(state, compression_targets={name[:-7] for name in SHAPES} | set(SHAPES))


def as_bytes(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_arrays(state: dict, folder) -> dict[str, np.ndarray]:
    save_file(state, folder / "plain")
    return {name: np.asarray(leaf) for name, leaf in load_sparse(folder / "plain")[0].items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_files_hold_the_bytes_that_theirs_hold(tmp_path, dtype):
    state = state_dict(dtype)
    params = to_arrays(state, tmp_path)
    save_sparse(
        tmp_path / "ours", params, {name: value != 0 if name in SHAPES else None for name, value in params.items()}
    )
    ours, theirs = load_file(tmp_path / "ours"), compress(state)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert as_bytes(ours[name]) == as_bytes(tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_read_our_files(tmp_path, dtype):
    state = state_dict(dtype)
    params = to_arrays(state, tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    masks = {name: value != 0 if name in SHAPES else None for name, value in params.items()}
    masks["layer.1.weight"][0, 0] = True  # a kept zero is an entry like any other
    save_sparse(folder / "model.safetensors", params, masks)
    found = dict(compressor().decompress(str(folder)))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_their_files(tmp_path, dtype):
    state = state_dict(dtype)
    save_file(compress(state), tmp_path / "theirs")
    params, masks = load_sparse(tmp_path / "theirs")
    assert params.keys() == state.keys()
    for name, expected in to_arrays(state, tmp_path).items():
        assert params[name].dtype == expected.dtype
        np.testing.assert_array_equal(params[name], expected)
        np.testing.assert_array_equal(masks[name], expected != 0 if name in SHAPES else np.ones_like(expected, bool))


def test_we_read_their_two_of_four_layout(tmp_path):
    weight = np.random.default_rng(0).standard_normal((6, 16), np.float32)
    mask = np.asarray(jaxprune.make_masks({"weight": weight}, 2, rule=rules.n_m(4))["weight"])
    dense = torch.from_numpy(np.where(mask, weight, 0))
    theirs = sparse_24_bitmask.Sparse24BitMaskTensor.from_dense(dense, "2:4").dict(name_prefix="layer")
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "theirs")
    params, masks = load_sparse(tmp_path / "theirs")
    np.testing.assert_array_equal(params["layer.weight"], dense.numpy())
    np.testing.assert_array_equal(masks["layer.weight"], mask)


def test_a_model_pruned_on_disk_is_theirs_to_read(tmp_path):
    (tmp_path / "model").mkdir()
    generator = torch.Generator().manual_seed(1)
    state = {f"layers.{i}.dense.weight": torch.randn((12, 20), generator=generator) for i in range(3)}
    save_file(state, tmp_path / "plain")
    storage.prune_file(tmp_path / "plain", tmp_path / "model" / "model.safetensors", 0.7, rule=rules.global_sparsity)
    params, _ = load_sparse(tmp_path / "model" / "model.safetensors")
    found = dict(compressor().decompress(str(tmp_path / "model")))
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), params[name])
    assert sum(int((tensor == 0).sum()) for tensor in found.values()) == round(0.7 * 3 * 240)
