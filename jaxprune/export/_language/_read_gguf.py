"""Llama-type models from GGUF files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._paths import as_prefix
from jaxprune.export._language._functions import LLAMA3, stretched
from jaxprune.export._language._gguf import (
    MODULES,
    OWN_SIZES,
    PAIRED,
    STRETCHES,
    TOKENS,
    is_turned,
    library,
    one_or_all,
    open_reader,
    tensor_name,
)
from jaxprune.export._language._llama import ATTENTION, PERCEPTRON, Sizes, from_pairs
from jaxprune.storage import StorageError

_TYPES = {"llama": "llama", OWN_SIZES: "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_QWEN2 = frozenset({"q_proj", "k_proj", "v_proj"})  # the biases that tell it from a Llama


def read_gguf(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Read a model of the type of Llama from a GGUF file, one tensor at a time; it needs the library gguf.

    Args:
        path: a file of the architectures llama (which Mistral's have, too), deci with attention and perceptron in every layer, qwen2 or
            qwen3, in any type that the library dequantises.

    Returns:
        The parameters as from `read_hugging_face`, all of them float32, and a configuration in the words of Hugging Face's library. Where
        layers have sizes of their own, the sizes in the configuration are lists.

    Raises:
        StorageError: the file is no such model, or damaged, or its rotations are scaled in other ways than linear and as in Llama 3.1; a tensor is missing or
            misshapen.
        ModuleNotFoundError: gguf is not installed.

    >>> import jax.numpy as jnp, tempfile
    >>> from jaxprune import export
    >>> layer = {f"{name}_proj": {"kernel": jnp.ones((4, 4))} for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "norm": {"scale": jnp.ones(4)}}
    >>> config = {"model_type": "llama", "head_dim": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export.write_gguf(folder + "/model.gguf", params, config, kind="F16")
    ...     params, config = read_gguf(folder + "/model.gguf")
    >>> params["layer_0"]["up_proj"]["kernel"].dtype, config["num_attention_heads"], config["rms_norm_eps"]
    (dtype('float32'), 2, 1e-05)
    """
    gguf = library()
    fields, tensors = _open(gguf, Path(path))
    config, sizes = _read_fields(Path(path), fields, tensors)
    architecture = fields["general.architecture"]
    leaves: dict[str, jax.Array] = {}
    for leaf, shape in sizes.shapes().items():
        name = tensor_name(leaf)
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise StorageError(f"{path} has no tensor {name!r}, which a {architecture} of its sizes has.")
        is_kernel = leaf.endswith("/kernel")
        theirs = shape[::-1] if is_kernel else shape
        if tuple(tensor.shape[::-1].tolist()) != theirs:
            raise StorageError(
                f"{path}: tensor {name!r} has shape {tensor.shape[::-1].tolist()}; by its sizes it should be {list(theirs)}."
            )
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise StorageError(
                f"{path}: tensor {name!r} is {tensor.tensor_type.name}, which gguf does not dequantise."
            ) from error
        values = values.T if is_kernel else values
        if architecture in PAIRED and is_turned(leaf):
            values = from_pairs(values, sizes.head_dim)
        leaves[leaf] = jax.device_put(np.array(values, np.float32, order="C"))  # not a view of the file
    tensors.pop(STRETCHES, None)
    if tensors:
        raise StorageError(f"{path} has {some(sorted(tensors))}, which a {architecture} of its sizes has not.")
    return as_prefix(leaves), config


def _open(gguf: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file says, by name, and its tensors, by name."""
    reader = open_reader(gguf, path)
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    fields = {name: field.contents() for name, field in reader.fields.items() if name not in long}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _read_fields(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[dict[str, Any], Sizes]:
    architecture = fields.get("general.architecture")
    if architecture not in _TYPES:
        raise StorageError(f"{path} has the architecture {architecture!r}; known are {', '.join(_TYPES)}.")

    def of(field: str, default: Any = None, kind: type = int) -> Any:
        found = fields.get(f"{architecture}.{field}", default)
        if found is None:
            raise StorageError(f"{path} does not say its {architecture}.{field}.")
        if not all(
            isinstance(n, int | float) and isinstance(n, kind) and n > 0
            for n in (found if isinstance(found, list) else [found])
        ):
            raise StorageError(f"{path} has {field} {found}, not a positive number.")
        return found

    layers = of("block_count")
    if layers > len(tensors):
        raise StorageError(f"{path} has {len(tensors)} tensors, and says that it has {layers} layers.")

    def sizes_of(field: str, default: Any = None) -> tuple[int, ...]:
        found = of(field, default)
        numbers = tuple(found) if isinstance(found, list) else (found,) * layers
        if len(numbers) != layers:
            raise StorageError(f"{path} has {field} for {len(numbers)} of {layers} layers.")
        return numbers

    heads = sizes_of("attention.head_count")
    head_dim = of("attention.key_length", of("embedding_length") // heads[0])
    for field in ("attention.value_length", "rope.dimension_count"):
        if of(field, head_dim) != head_dim:
            raise StorageError(
                f"{path} has {field} {of(field)}, other than the {head_dim} features of a head, which cannot be read."
            )
    base = _shortest(of("rope.freq_base", 10_000.0, float))
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise StorageError(f"{path} has rotations scaled as {scaling!r}; known are linear and those of Llama 3.1.")
    sizes = Sizes(
        vocabulary=int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        width=of("embedding_length"),
        head_dim=head_dim,
        heads=heads,
        kv_heads=sizes_of("attention.head_count_kv", fields.get(f"{architecture}.attention.head_count")),
        inner=sizes_of("feed_forward_length"),
        tied="output.weight" not in tensors,
        biases=frozenset(name for name in ATTENTION + PERCEPTRON if f"blk.0.{MODULES[name]}.bias" in tensors),
        head_norms=architecture == "qwen3",
    )
    config = {
        "model_type": "qwen2" if sizes.biases == _QWEN2 and architecture in PAIRED else _TYPES[architecture],
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": layers,
        "num_attention_heads": one_or_all(heads),
        "num_key_value_heads": one_or_all(sizes.kv_heads),
        "intermediate_size": one_or_all(sizes.inner),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": _shortest(of("attention.layer_norm_rms_epsilon", kind=float)),
        "rope_theta": base,
        "tie_word_embeddings": sizes.tied,
    }
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _shortest(of("rope.scaling.factor", kind=float))}
    elif STRETCHES in tensors:
        config["rope_scaling"] = _read_stretches(path, np.asarray(tensors[STRETCHES].data, np.float32), base, head_dim)
    tokens = {ours: fields.get(f"tokenizer.ggml.{theirs}") for ours, theirs in TOKENS.items()}
    return config | {name: token for name, token in tokens.items() if token is not None}, sizes


def _read_stretches(path: Path, factors: np.ndarray, base: float, head_dim: int) -> dict[str, Any]:
    """Say what stretches wavelengths by these factors; raise a StorageError unless it is as in Llama 3.1 to 3.3."""
    scaling = {"rope_type": "llama3", "factor": _shortest(factors.max(initial=1)), **LLAMA3}
    expected = stretched(scaling, base, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise StorageError(
            f"{path} has rotations stretched by {STRETCHES}, other than in Llama 3.1, which cannot be read."
        )
    return scaling


def _shortest(number: float) -> float:
    """The shortest decimal number that is the same in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
