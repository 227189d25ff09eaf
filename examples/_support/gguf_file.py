"""A Llama in a GGUF file: its configuration, its parameters for `llama.Llama`, its tokenizer."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from _support.byte_pairs import BytePairs
from _support.data import DataError
from _support.llama import Config

# From the names in the file to those of the modules.
_NAMES = (
    (r"^token_embd\.weight$", "embed/embedding"),
    (r"^output_norm\.weight$", "norm/scale"),
    (r"^blk\.(\d+)\.", r"layer_\1/"),
    (r"attn_norm\.weight$", "attention_norm/scale"),
    (r"ffn_norm\.weight$", "mlp_norm/scale"),
    (r"attn_(q|k|v)\.weight$", r"\1_proj/kernel"),
    (r"attn_output\.weight$", "o_proj/kernel"),
    (r"ffn_(gate|up|down)\.weight$", r"\1_proj/kernel"),
)


def read(path: Path) -> tuple[Config, Any, BytePairs]:
    """Read a file of the architecture ``llama``, with a tied table and byte pairs; quantised weights become float32.

    Raises:
      DataError: the package gguf is not installed, or the file holds another kind of model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DataError("the weights are in a GGUF file, which a package reads: pip install gguf")
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kinds = fields["general.architecture"], fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kinds != ("llama", "gpt2", "smollm"):
        raise DataError(f"{path} holds a {kinds[0]} with the tokenizer {'/'.join(map(str, kinds[1:]))}, not a SmolLM2")
    flat = {}
    config = _config(fields)
    for tensor in reader.tensors:
        name = tensor.name
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        heads = {"q_proj/kernel": config.heads, "k_proj/kernel": config.kv_heads}.get(name.partition("/")[2])
        if heads is not None:
            array = halves(array, heads)
        # A kernel there is [outputs, inputs].
        flat[tuple(name.split("/"))] = jnp.asarray(array.T if name.endswith("kernel") else array)
    tokenizer = BytePairs(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"])
    return config, flax.traverse_util.unflatten_dict(flat), tokenizer


def halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Bring the outputs of each head from pairs that are turned together to a first and a second half, as `rotate` has them.

    >>> halves(np.arange(8)[:, None], heads=2)[:, 0].tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weights.reshape(heads, -1, 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


def _config(fields: dict[str, Any]) -> Config:
    of = {name.removeprefix("llama."): value for name, value in fields.items()}
    return Config(
        vocabulary=len(fields["tokenizer.ggml.tokens"]),
        width=of["embedding_length"],
        layers=of["block_count"],
        heads=of["attention.head_count"],
        kv_heads=of["attention.head_count_kv"],
        head_dim=of["embedding_length"] // of["attention.head_count"],
        inner=of["feed_forward_length"],
        rope_base=of["rope.freq_base"],
        epsilon=of["attention.layer_norm_rms_epsilon"],
    )
