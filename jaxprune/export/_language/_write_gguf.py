"""Llama-type models to GGUF files."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.export._language._classes import family_like
from jaxprune.export._language._functions import Function, number, read_function, stretched
from jaxprune.export._language._gguf import (
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
from jaxprune.export._language._gguf_blocks import BLOCK, read_blocks
from jaxprune.export._language._llama import Leaf, Llama, Sizes, codes_of, read_llama, to_pairs
from jaxprune.oneshot import Codes
from jaxprune.storage import StorageError, _atomic

KINDS = ("F16", "BF16", "Q8_0", "Q4_0")
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# The file says these of itself, whatever the one that its tokenizer comes from says.
_OF_ONE_FILE = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "general.size_label")  # fmt: skip
_LARGEST = {"F16": float(np.finfo(np.float16).max), "BF16": 3.38e38}


def write_gguf(
    path: str | os.PathLike[str],
    params: Any,
    config: Mapping[str, Any],
    *,
    kind: str = "Q8_0",
    codes: Mapping[str, Codes] | None = None,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Write a model of the type of Llama as a GGUF file, one tensor at a time; it needs the library gguf.

    Widths, heads and layers are those of the parameters. Where layers differ, ``head_count``, ``head_count_kv`` and
    ``feed_forward_length`` are arrays with an entry for each, and the architecture is deci, the one of those computing the same whose
    layers llama.cpp gives sizes of their own. Zeros stay zeros in every kind. The file appears whole or not at all.

    Args:
        path: the file.
        params: as `write_hugging_face` takes them.
        config: as `read_hugging_face` and `read_gguf` return it; with `head_dim`, `rms_norm_eps`, `max_position_embeddings`.
        kind: "F16", "BF16", "Q8_0" (8 bits, a scale for 32 inputs) or "Q4_0" (4 bits, the same). Norms and biases stay float32. With Q4_0 the
            tables of tokens and of the head are Q8_0. A matrix whose inputs are no multiple of 32 is F16 where integers were asked for.
        codes: by path, the integers that kernels were rounded to by `oneshot.gptq` or `oneshot.prune_and_quantize`, symmetric and with
            ``group_size=32``: those of 4 bits are written as Q4_0, of 8 bits as Q8_0, as they are.
        source: a GGUF file whose tokenizer and general remarks are copied, as they are. Without, the file has no tokenizer.
        force: whether to replace a file that is there.

    Returns:
        The kind that each tensor was written in, by its name in the file.

    Raises:
        ValueError: a `kind` that there is not; layers of different sizes with norms of heads; what the configuration says
            has no field (a sliding window, other ways to scale rotations than linear and llama3); a weight is not finite or too large; the
            tokenizer of `source` has another number of tokens; codes have other bits or groups, codes of zero, scales that float16 cannot
            hold, or are of no kernel; or as in `write_hugging_face`.
        TypeError: a leaf is no array.
        StorageError: `source` is no GGUF file; a subclass of ValueError.
        FileExistsError: the file is there already, and `force` is False.
        ModuleNotFoundError: gguf is not installed.

    >>> import jax.numpy as jnp, tempfile
    >>> layer = {f"{name}_proj": {"kernel": jnp.ones((4, 4))} for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "norm": {"scale": jnp.ones(4)}}
    >>> config = {"model_type": "llama", "head_dim": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kinds = write_gguf(folder + "/model.gguf", params, config, kind="BF16")
    >>> kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_norm.weight"]
    ('BF16', 'F32')
    """
    gguf = library()
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; known are {', '.join(KINDS)}.")
    model = read_llama(params, config)
    architecture = _architecture(model.sizes, config)
    function = read_function(config, "a GGUF file")
    context = number(config, "max_position_embeddings", int)
    copied = {} if source is None else _copied(gguf, Path(source), model.sizes)
    _atomic.require_file(Path(path))
    _atomic.require_new(Path(path), force)
    tensors = _tensors(gguf, model, function, architecture, kind, codes_of(codes or {}, model))
    with _atomic.replacing(Path(path)) as file:
        writer = gguf.GGUFWriter(file.name, architecture)
        try:
            _add_fields(gguf, writer, model.sizes, config, function, kind, copied)
            writer.add_context_length(context)
            for tensor in tensors:
                of_type = gguf.GGMLQuantizationType[tensor.kind]
                size = gguf.quants.quant_shape_to_byte_shape(tensor.shape, of_type)
                count = int(np.prod(size))
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, of_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor.encode())
        finally:
            writer.close()
    return {tensor.name: tensor.kind for tensor in tensors}


class _Tensor(NamedTuple):
    """A tensor to write: its name, shape and kind in the file, and the function that makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    encode: Callable[[], np.ndarray]


def _architecture(sizes: Sizes, config: Mapping[str, Any]) -> str:
    family_like(config, sizes)
    found = _ARCHITECTURES[config["model_type"]]
    if any(len(set(numbers)) > 1 for numbers in (sizes.heads, sizes.kv_heads, sizes.inner)):
        if sizes.head_norms:
            raise ValueError(
                "params has layers of different sizes, which llama.cpp does not know of models with norms of heads. Cut the same number from "
                "every layer."
            )
        return OWN_SIZES
    # There a Qwen2 has as many features in its heads as in its stream; a Llama with biases computes the same.
    return "llama" if found == "qwen2" and sizes.heads[0] * sizes.head_dim != sizes.width else found


def _tensors(
    gguf: Any, model: Llama, function: Function, architecture: str, kind: str, codes: Mapping[str, Codes]
) -> list[_Tensor]:
    head_dim = model.sizes.head_dim
    found = []
    for path in model.sizes.shapes():
        leaf, is_kernel = model.leaves[path], path.endswith("/kernel")
        paired = architecture in PAIRED and is_turned(path)
        shape = leaf.shape[::-1] if is_kernel else leaf.shape
        if path in codes:
            of_leaf, blocks = read_blocks(codes[path], leaf, head_dim if paired else None)
        else:
            of_leaf = _kind(path, shape, kind)
            make = functools.partial(_values, leaf, is_kernel, head_dim if paired else None)
            blocks = functools.partial(_encoded, gguf, of_leaf, leaf.name, make)
        found.append(_Tensor(tensor_name(path), shape, of_leaf, blocks))
    if function.scaling.get("rope_type") == "llama3":
        factors = stretched(function.scaling, function.base, head_dim).astype(np.float32)
        found.append(_Tensor(STRETCHES, factors.shape, "F32", lambda: factors))
    return found


def _values(leaf: Leaf, is_kernel: bool, head_dim: int | None) -> np.ndarray:
    values = leaf.read()
    values = values if head_dim is None else to_pairs(values, head_dim)
    return values.T if is_kernel else values


def _kind(path: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) < 2:
        return "F32"
    if kind not in ("Q8_0", "Q4_0"):
        return kind
    if shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if path in ("embed/embedding", "head/kernel") else kind


def _encoded(gguf: Any, kind: str, title: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Make a tensor and encode it; raise a ValueError where its kind cannot hold it."""
    values = np.ascontiguousarray(make(), np.float32)
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= _LARGEST.get(kind, np.finfo(np.float32).max):
        what = f"{largest:.4g}, which is too large for {kind}" if np.isfinite(largest) else "NaN or infinity"
        raise ValueError(f"{title} holds {what}.")
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def _add_fields(
    gguf: Any,
    writer: Any,
    sizes: Sizes,
    config: Mapping[str, Any],
    function: Function,
    kind: str,
    copied: Mapping[str, Any],
) -> None:
    for name, field in copied.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    if kind.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_embedding_length(sizes.width)
    writer.add_block_count(len(sizes.heads))
    writer.add_feed_forward_length(one_or_all(sizes.inner))
    writer.add_head_count(one_or_all(sizes.heads))
    writer.add_head_count_kv(one_or_all(sizes.kv_heads))
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(function.epsilon)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(function.base)
    if function.scaling.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(function.scaling["factor"])
    if not copied:
        writer.add_tokenizer_model("none")
        for ours, theirs in TOKENS.items():
            if isinstance(config.get(ours), int):
                writer.add_uint32(f"tokenizer.ggml.{theirs}", config[ours])


def _copied(gguf: Any, source: Path, sizes: Sizes) -> dict[str, Any]:
    """The fields of a file that say something of its tokenizer, or something general."""
    fields = open_reader(gguf, source).fields
    found = {name: field for name, field in fields.items() if name.startswith(("tokenizer.", "general."))}
    tokens = found.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise StorageError(f"{source} has no tokenizer.")
    if len(tokens.data) != sizes.vocabulary:
        raise ValueError(f"{source} has a tokenizer of {len(tokens.data):,} tokens, and params {sizes.vocabulary:,}.")
    return {name: field for name, field in found.items() if name not in _OF_ONE_FILE}
