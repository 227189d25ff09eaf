"""Models for the tests of storage, and files read by another library."""

from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

import jaxprune
from jaxprune import rules

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
OTHERS = [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.complex64]
W = np.ones((2, 2), np.float32)


def raw(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a file without numbers of one byte or bfloat16 by the safetensors library."""
    return safetensors.numpy.load_file(path)


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def random_model(seed: int = 0) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    params = {
        "conv": {"kernel": rng.standard_normal((3, 3, 5, 6), np.float32), "bias": rng.standard_normal(6, np.float32)},
        "dense": {"kernel": rng.standard_normal((30, 11), np.float32), "bias": rng.standard_normal(11, np.float32)},
    }
    return params, jaxprune.make_masks(params, 0.8, rule=rules.layer_sparsity)


def torch_like(seed: int = 0, layers: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    flat: dict[str, np.ndarray] = {"embeddings.word.weight": rng.standard_normal((20, 8), np.float32)}
    for i in range(layers):
        flat[f"layer.{i}.dense.weight"] = rng.standard_normal((12, 16), np.float32)
        flat[f"layer.{i}.dense.bias"] = rng.standard_normal(12, np.float32)
        flat[f"layer.{i}.LayerNorm.weight"] = np.ones(12, np.float32)
    return flat
