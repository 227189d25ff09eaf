"""A Llama in a GGUF file: its configuration, its parameters for `llama.Llama`, its tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

from _support.byte_pairs import BytePairs
from _support.data import DataError
from _support.llama import Config
from jaxprune import export


def read(path: Path) -> tuple[Config, Any, BytePairs]:
    """Read a file of the architecture ``llama``, with a tied table and byte pairs; quantised weights become float32.

    Raises:
      DataError: the package gguf is not installed, or the file holds another kind of model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DataError("the weights are in a GGUF file, which a package reads: pip install gguf")
    import gguf

    fields = gguf.GGUFReader(path).fields
    names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    kinds = tuple(fields[name].contents() if name in fields else None for name in names)
    if kinds != ("llama", "gpt2", "smollm"):
        raise DataError(f"{path} holds a {kinds[0]} with the tokenizer {'/'.join(map(str, kinds[1:]))}, not a SmolLM2")
    params, found = export.read_gguf(path)
    config = Config(
        vocabulary=found["vocab_size"],
        width=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        kv_heads=found["num_key_value_heads"],
        head_dim=found["head_dim"],
        inner=found["intermediate_size"],
        rope_base=found["rope_theta"],
        epsilon=found["rms_norm_eps"],
    )
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    return config, params, BytePairs(tokens, merges)
