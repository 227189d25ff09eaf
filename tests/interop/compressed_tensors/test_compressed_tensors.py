"""Folders of integers beside those of compressed-tensors itself: the same bytes, read by it to the same numbers."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from safetensors.torch import load_file, save_file

from jaxprune import export, oneshot

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own

INPUTS, OUTPUTS, GROUP = 96, 40, 32
KINDS = list(itertools.product(range(2, 9), [None, GROUP], [True, False]))


def random_codes(bits, group_size, symmetric, seed=0, inputs=INPUTS, outputs=OUTPUTS) -> oneshot.Codes:
    rng = np.random.default_rng(seed)
    groups = 1 if group_size is None else inputs // group_size
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(least, most, (inputs, outputs), np.int8, endpoint=True)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, (groups, outputs)), jnp.bfloat16).astype(jnp.float32)
    zero = np.zeros if symmetric else (lambda *a: rng.integers(least, most, a[0], np.int8, endpoint=True))
    return oneshot.Codes(jnp.asarray(codes), scale, jnp.asarray(zero((groups, outputs), np.int8)), bits)


def quantized(codes, dtype=jnp.float32) -> oneshot.Quantized:
    zero = codes.values() == 0
    params = {"up": {"kernel": codes.values().astype(dtype), "bias": jnp.arange(codes.codes.shape[1], dtype=dtype)}}
    masks = {"up": {"kernel": ~zero, "bias": jnp.ones(codes.codes.shape[1], bool)}}
    return oneshot.Quantized(params, masks, {"up/kernel": codes})


def as_bytes(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def to_torch(array) -> torch.Tensor:
    array = np.asarray(array)
    return (
        torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        if array.dtype == jnp.bfloat16
        else torch.from_numpy(array.copy())
    )


def theirs(codes, dtype, scheme, form) -> dict[str, torch.Tensor]:
    """What their own packer makes of the numbers, the scales and the codes of zero.

    It rounds the numbers anew, in their dtype; where that is bfloat16, it finds other codes for some, so it is given float32.
    """
    state = {"weight": to_torch(codes.values().T), "weight_scale": to_torch(codes.scale.astype(dtype).T)}
    if jnp.any(codes.zero_point != 0):
        state["weight_zero_point"] = to_torch(codes.zero_point.T)
    return BaseCompressor.get_value_from_registry(form).compress(state, scheme)


@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_are_theirs_and_they_read_the_numbers_exactly(tmp_path, dtype, round_inputs):
    for i, kind in enumerate(KINDS):
        folder, codes = tmp_path / str(i), random_codes(*kind, seed=i)
        found = quantized(codes, dtype)
        export.write_compressed_tensors(folder, found, round_inputs=round_inputs)
        config = QuantizationConfig(**json.loads((folder / "config.json").read_text())["quantization_config"])
        (scheme,) = config.config_groups.values()
        assert config.format == scheme.format == ("int-quantized" if round_inputs else "pack-quantized")
        ours = load_file(folder / "model.safetensors")
        bias = ours.pop("up.bias")
        assert torch.equal(bias, to_torch(found.params["up"]["bias"]))
        expected = theirs(codes, dtype, scheme, config.format)
        assert {f"up.{name}" for name in expected} == ours.keys(), kind
        for name, tensor in expected.items():
            mine = ours[f"up.{name}"]
            assert (mine.dtype, mine.shape, as_bytes(mine)) == (tensor.dtype, tensor.shape, as_bytes(tensor)), (
                kind,
                name,
            )
        state = {name.removeprefix("up."): tensor for name, tensor in ours.items()}
        weight = BaseCompressor.get_value_from_registry(config.format).decompress(state, scheme)["weight"]
        assert torch.equal(weight, to_torch(found.params["up"]["kernel"].T)), kind


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_we_read_their_folders(tmp_path, form):
    for i, (bits, group_size, symmetric) in enumerate(KINDS):
        folder, codes = tmp_path / str(i), random_codes(bits, group_size, symmetric, seed=i)
        folder.mkdir()
        weights = {"num_bits": bits, "symmetric": symmetric, "group_size": group_size}
        weights["strategy"] = "channel" if group_size is None else "group"
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        state = {f"model.up.{name}": t.contiguous() for name, t in theirs(codes, jnp.float32, scheme, form).items()}
        save_file(state | {"model.norm.weight": torch.arange(3.0)}, folder / "model.safetensors")
        config = QuantizationConfig(config_groups={"group_0": scheme}, format=form, quantization_status="compressed")
        (folder / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
        found = export.read_compressed_tensors(folder)
        for name in ("codes", "scale", "zero_point"):
            np.testing.assert_array_equal(getattr(found.codes["model/up/kernel"], name), getattr(codes, name))
        np.testing.assert_array_equal(found.params["model"]["up"]["kernel"], codes.values())
        np.testing.assert_array_equal(found.params["model"]["norm"]["weight"], np.arange(3.0))
        assert all(np.all(mask) for mask in jax.tree.leaves(found.masks))


@pytest.mark.parametrize("round_inputs", [False, True])
def test_their_model_takes_the_folder_and_computes_what_the_codes_say(tmp_path, round_inputs):
    """Two schemes and a layer that is not rounded, through their own way of loading a model."""
    up, down = random_codes(8, None, True, inputs=64, outputs=96), random_codes(8, 32, False, inputs=96, outputs=64)
    head = jax.random.normal(jax.random.key(0), (64, 10))
    params = {"up": {"kernel": up.values()}, "down": {"kernel": down.values()}, "head": {"kernel": head}}
    found = oneshot.Quantized(params, None, {"up/kernel": up, "down/kernel": down})
    export.write_compressed_tensors(tmp_path, found, round_inputs=round_inputs, config={"model_type": "mine"})
    config = QuantizationConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    sizes = {"down": (96, 64), "head": (64, 10), "up": (64, 96)}
    model = torch.nn.ModuleDict({name: torch.nn.Linear(*size, bias=False) for name, size in sizes.items()})
    apply_quantization_config(model, config)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert (missing, unexpected) == ([], [])
    compressor.decompress_model(model)
    for name, kernel in params.items():
        np.testing.assert_array_equal(model[name].weight.detach().numpy(), np.asarray(kernel["kernel"]).T)
    # What they would write of the model themselves says the same of it, but for how modules are named.
    own = QuantizationConfig.from_pretrained(model)
    assert len(own.config_groups) == len(config.config_groups) == 2
    for mine, their in zip(config.config_groups.values(), own.config_groups.values(), strict=True):
        assert mine.weights.model_dump() == their.weights.model_dump()
        assert (mine.format, mine.input_activations) == (their.format, their.input_activations)
