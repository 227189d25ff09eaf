"""Llama-type models to and from folders of Hugging Face's library."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import as_prefix
from jaxprune.export._compressed._integers import Integers, read_integers
from jaxprune.export._compressed._schemes import to_config
from jaxprune.export._language._classes import family_of, fitted, sizes_of, with_head_dim
from jaxprune.export._language._folders import CONFIG, find_tokenizer, read_config, write_folder
from jaxprune.export._language._llama import Leaf, codes_of, read_llama
from jaxprune.oneshot import Codes
from jaxprune.storage import StorageError, _writer
from jaxprune.storage._checkpoint import INDEX_ENDING, Checkpoint
from jaxprune.storage._container import NAMES
from jaxprune.storage._tensors import Stored

# From our modules to theirs. What we call kernel, scale and embedding they call weight.
_MODULES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
# Tables of angles that older files hold, and that are computed.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def read_hugging_face(folder: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Read a model of the type of Llama from a folder of Hugging Face's library, one tensor at a time.

    The classes are LlamaForCausalLM (as SmolLM2 and others have it), MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
    Nothing in the folder is executed. No more memory is taken than for the parameters and one tensor.

    Args:
        folder: with `config.json` and `model.safetensors`, or shards with an index; files that `prune_file` made sparse are
            read, too.

    Returns:
        The parameters, nested dicts of arrays in the dtypes of the file, D the width and V the vocabulary:
        ``embed/embedding`` [V, D], ``norm/scale`` [D], ``head/kernel`` [D, V] unless the table is the head, too; and in ``layer_0``,
        ``layer_1``, ...: ``attention_norm/scale``, ``mlp_norm/scale`` [D], ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``,
        ``gate_proj``, ``up_proj``, ``down_proj`` with a ``kernel`` [inputs, outputs] and, where the class has one, a ``bias``
        [outputs]; in Qwen3 ``q_norm/scale`` and ``k_norm/scale`` [head_dim]. Rotations pair the first half of a head's features with
        the second.
        The configuration is what `config.json` holds, with a `head_dim` where it leaves that to be computed.

    Raises:
        StorageError: the folder is no such model, or damaged; a tensor is missing, or not of the shape that the configuration says.

    >>> import jax.numpy as jnp, tempfile
    >>> shapes = {"q": (4, 4), "k": (4, 2), "v": (4, 2), "o": (4, 4), "gate": (4, 6), "up": (4, 6), "down": (6, 4)}
    >>> layer = {f"{name}_proj": {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "norm": {"scale": jnp.ones(4)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_hugging_face(folder, params, {"model_type": "llama", "head_dim": 2})
    ...     params, config = read_hugging_face(folder)
    >>> params["layer_0"]["down_proj"]["kernel"].shape, config["num_key_value_heads"], config["tie_word_embeddings"]
    ((6, 4), 1, True)
    """
    folder = Path(folder)
    try:
        config = with_head_dim(read_config(folder))
    except StorageError:
        raise
    except ValueError as error:
        raise StorageError(f"{folder / CONFIG}: {error}.") from None
    architecture = family_of(config).architecture
    single = folder / "model.safetensors"
    alone = single.is_file() and not any(folder.glob("*" + INDEX_ENDING))
    with Checkpoint(single if alone else folder) as checkpoint:
        if config["num_hidden_layers"] > len(checkpoint.tensors):
            raise StorageError(
                f"{folder} has {len(checkpoint.tensors)} tensors, and its {CONFIG} says {config['num_hidden_layers']} layers."
            )
        sizes = sizes_of(config)
        wanted = {_name(path): (path, shape) for path, shape in sizes.shapes().items()}
        missing = sorted(wanted.keys() - checkpoint.tensors.keys())
        if missing:
            raise StorageError(f"{folder} has no tensor {some(missing)}, which a {architecture} of its {CONFIG} has.")
        extra = checkpoint.tensors.keys() - wanted.keys()
        extra -= {name for name in extra if _COMPUTED.fullmatch(name) or (sizes.tied and name == "lm_head.weight")}
        if extra:
            raise StorageError(f"{folder} has {some(sorted(extra))}, which a {architecture} of its {CONFIG} has not.")
        leaves = {}
        for name, (path, shape) in wanted.items():
            tensor = checkpoint.tensors[name]
            theirs = shape[::-1] if path.endswith("/kernel") else shape
            if tensor.shape != theirs:
                tensor.file.fail(f"has shape {list(tensor.shape)}; by {CONFIG} it should be {list(theirs)}", name)
            leaves[path] = _load(tensor, path)
    return as_prefix(leaves), config


def write_hugging_face(
    folder: str | os.PathLike[str],
    params: Any,
    config: Mapping[str, Any],
    *,
    codes: Mapping[str, Codes] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model of the type of Llama as a folder that Hugging Face's library opens.

    Widths, heads, the number of layers and of tokens are those of the parameters: of a smaller model they are smaller. What shapes do not
    say is taken from the configuration. The folder appears whole or not at all, and one tensor is on the host at a time.

    Args:
        folder: where to write. What is there already is replaced only by `force`, and only if it holds nothing but a model.
        params: floating-point arrays as `read_hugging_face` returns them, or with all layers stacked along a first axis in ``layers``
            instead of ``layer_0``, ``layer_1``, ... Layers are written in the order of their numbers, which may have gaps where some
            were dropped: then of lists with an entry for each layer (`layer_types`) those entries go, too.
        config: what `read_hugging_face` returned, or a `config.json`. It needs `model_type` and `head_dim`.
        codes: by path, the integers that kernels were rounded to by `oneshot.gptq` or `oneshot.prune_and_quantize`, with scales that the
            dtypes of the kernels hold. They are packed as in `write_compressed_tensors`, and the configuration says so; a pruned weight is
            the code of zero. Masks are kept by `save_sparse`.
        tokenizer: a folder whose tokenizer (and `generation_config.json`) is copied untouched.
        max_shard_bytes: a file takes so many bytes at most, unless one tensor takes more.
        force: whether to replace a folder that is there.

    Returns:
        The configuration as it was written; its `dtype` is that of the table of tokens.

    Raises:
        ValueError: the class cannot express the model: layers of different widths, heads that do not go into the width
            (LlamaForCausalLM), biases or norms that it has not. The message says what is nearest. Or a leaf is missing, misshapen, traced
            or not floating-point, or a token that the configuration names was cut; or codes cannot be packed so, or are of no kernel.
        TypeError: a leaf is no array.
        StorageError: `tokenizer` has no tokenizer; a subclass of ValueError.
        FileExistsError: the folder is there already, and `force` is False.

    >>> import jax.numpy as jnp
    >>> layer = {name: {"kernel": jnp.ones((4, 4))} for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    >>> layer |= {name: {"kernel": jnp.ones((4, 4))} for name in ("gate_proj", "up_proj", "down_proj")}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "layer_3": layer, "norm": {"scale": jnp.ones(4)}}
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = write_hugging_face(folder, params, {"model_type": "mistral", "head_dim": 2})
    >>> config["num_hidden_layers"], config["num_attention_heads"], config["dtype"]
    (2, 2, 'float32')
    """
    model = read_llama(params, config)
    smaller = fitted(config, model)
    beside = [] if tokenizer is None else find_tokenizer(tokenizer)
    integers = {path: _integers(model.leaves[path], held) for path, held in codes_of(codes or {}, model).items()}
    chunks = [_chunk(path, model.leaves[path], integers.get(path)) for path in model.sizes.shapes()]
    if integers:
        schemes = {_name(path).removesuffix(".weight"): held.scheme for path, held in integers.items()}
        smaller["quantization_config"] = to_config(schemes, round_inputs=False)
    write_folder(folder, smaller, chunks, beside=beside, max_shard_bytes=max_shard_bytes, force=force)
    return smaller


def _name(path: str) -> str:
    """What a leaf is called there.

    >>> _name("layer_3/q_proj/kernel"), _name("norm/scale"), _name("layer_0/k_proj/bias")
    ('model.layers.3.self_attn.q_proj.weight', 'model.norm.weight', 'model.layers.0.self_attn.k_proj.bias')
    """
    *layer, module, leaf = path.split("/")
    within = "".join(name.replace("layer_", "model.layers.") + "." for name in layer)
    return f"{within}{_MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _load(tensor: Stored, path: str) -> jax.Array:
    if not is_floating(tensor):
        tensor.file.fail(f"is {tensor.dtype}, not floating-point", tensor.name)
    values, _ = tensor.load()
    return jax.device_put(np.ascontiguousarray(values.T) if path.endswith("/kernel") else values)


def _integers(leaf: Leaf, codes: Codes) -> Integers:
    return read_integers(codes, None, leaf, leaf.name).transposed()


def _chunk(path: str, leaf: Leaf, integers: Integers | None) -> _writer.Chunk:
    if integers is not None:
        return _writer.ready(integers.tensors(_name(path).removesuffix("weight"), round_inputs=False))
    if leaf.dtype not in NAMES:
        raise ValueError(f"{leaf.name} is {leaf.dtype}, which a safetensors file cannot hold; cast it.")
    name, is_kernel = _name(path), path.endswith("/kernel")
    spec = _writer.Spec(leaf.dtype, leaf.shape[::-1] if is_kernel else leaf.shape)

    def make() -> dict[str, np.ndarray]:
        values = leaf.read()
        return {name: values.T if is_kernel else values}

    return _writer.Chunk({name: spec}, make)
