"""Llama-type models to and from the names and layouts of MaxText."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._paths import as_prefix
from jaxprune.export._language._classes import family_like, one_for_all, require_family
from jaxprune.export._language._functions import LLAMA3, read_function
from jaxprune.export._language._llama import (
    ATTENTION,
    Leaf,
    Sizes,
    from_pairs,
    read_head_dim,
    read_leaves,
    read_llama,
    to_pairs,
)

_OUTSIDE = {
    "embed/embedding": "token_embedder/embedding",
    "norm/scale": "decoder/decoder_norm/scale",
    "head/kernel": "decoder/logits_dense/kernel",
}
_MODULES = {
    "attention_norm": "pre_self_attention_layer_norm",
    "mlp_norm": "post_self_attention_layer_norm",
    "q_proj": "self_attention/query",
    "k_proj": "self_attention/key",
    "v_proj": "self_attention/value",
    "o_proj": "self_attention/out",
    "q_norm": "self_attention/query_norm",
    "k_norm": "self_attention/key_norm",
    "gate_proj": "mlp/wi_0",
    "up_proj": "mlp/wi_1",
    "down_proj": "mlp/wo",
}
_BLOCKS = {"llama": "llama2", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
_SCALED = ("llama2", "mistral")  # whose attention does not divide by the root of head_dim: the queries are stored so
_OUTER = re.compile(r"^(params/)*")
_LAYER = re.compile(r"decoder/layers(_(?P<number>\d+))?/(?P<module>.+)/(?P<kind>\w+)")
_AXIS = 1  # of the layers of a scan
# The one stretching of wavelengths that it knows, and with it the other order of features.
_LLAMA3 = {"factor": 8.0, **LLAMA3}


def to_maxtext(params: Any, config: Mapping[str, Any], *, scan_layers: bool = True) -> tuple[Any, dict[str, Any]]:
    """Return a model of the type of Llama in the names and layouts of MaxText, with the configuration that builds it there.

    MaxText trains on from what is returned once it is saved as the parameters of its `TrainState`. Pass the configuration to it as a
    file of a model, or field by field, and leave its `model_name` at ``default``: other names choose rotations of their own.

    Args:
        params: as `write_hugging_face` takes them.
        config: as `read_hugging_face` returns it; with `head_dim` and `rms_norm_eps`.
        scan_layers: whether layers are stacked, along axis 1, as they are there by default.

    Returns:
        ``{"params": {"token_embedder": ..., "decoder": ...}}``. With heads H of d features on a width D, `query`, `key` and `value` are
        [D, H, d], `out` is [H, d, D], `wi_0` (the gate) and `wi_1` are [D, inner], `wo` is [inner, D]; stacked, [D, layers, H, d] and
        so on. Queries of the blocks llama2 and mistral are divided by the root of d. With the rotations of Llama 3.1, features that are
        turned together lie side by side; otherwise they stay a first and a second half.
        And the fields of its configuration: widths, heads, layers, the block, rotations, norms.

    Raises:
        ValueError: layers of different sizes; biases that its block has not; what the configuration says has no field (a sliding window,
            other ways to scale rotations than linear and that of Llama 3.1); or as in `write_hugging_face`.
        TypeError: a leaf is no array.

    >>> import jax.numpy as jnp
    >>> layer = {f"{name}_proj": {"kernel": jnp.ones((4, 4))} for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "layer_3": layer, "norm": {"scale": jnp.ones(4)}}
    >>> tree, overrides = to_maxtext(params, {"model_type": "llama", "head_dim": 2, "rms_norm_eps": 1e-5})
    >>> tree["params"]["decoder"]["layers"]["self_attention"]["query"]["kernel"].shape
    (4, 2, 2, 2)
    >>> overrides["base_num_decoder_layers"], overrides["base_num_query_heads"], overrides["logits_via_embedding"]
    (2, 2, True)
    """
    model = read_llama(params, config)
    sizes = model.sizes
    family = family_like(config, sizes)
    if sizes.biases != family.biases:
        raise ValueError(
            f"params has biases in {some(sorted(sizes.biases))}; MaxText's block for a {config['model_type']} has them in "
            f"{some(sorted(family.biases))}."
        )
    overrides = _overrides(sizes, config)
    layout = _layout(config)
    found: dict[str, jax.Array] = {}
    for path in sizes.shapes():
        if path in _OUTSIDE:
            found[_OUTSIDE[path]] = _put(model.leaves[path].read())
        elif path.startswith("layer_0/"):
            leaf = path.removeprefix("layer_0/")
            module, _, kind = leaf.partition("/")
            layers = (layout.theirs(leaf, model.leaves[f"layer_{i}/{leaf}"].read()) for i in range(len(sizes.heads)))
            if scan_layers:
                found[f"decoder/layers/{_MODULES[module]}/{kind}"] = _put(np.stack(list(layers), axis=_AXIS))
            else:
                found |= {
                    f"decoder/layers_{i}/{_MODULES[module]}/{kind}": _put(layer) for i, layer in enumerate(layers)
                }
    return {"params": as_prefix(found)}, overrides | {"scan_layers": scan_layers, "param_scan_axis": _AXIS}


def from_maxtext(tree: Any, config: Mapping[str, Any]) -> Any:
    """Return the parameters of a model in MaxText as `read_hugging_face` would.

    Args:
        tree: what `to_maxtext` returns, or `TrainState.params`, or what of an Orbax checkpoint lies under ``params``, with layers
            stacked along axis 1 or one by one.
        config: of Hugging Face's library, as for `to_maxtext`: the model type, `head_dim` and rotations tell how queries and keys are
            stored. Its sizes need not be those of the tree.

    Returns:
        The parameters, with ``layer_0``, ``layer_1``, ...

    Raises:
        ValueError: a leaf has a name that models of this type have not, or is missing, or has the shape of another model.
        TypeError: a leaf is no array.

    >>> import jax.numpy as jnp
    >>> layer = {f"{name}_proj": {"kernel": jnp.ones((4, 4))} for name in ("q", "k", "v", "o", "gate", "up", "down")}
    >>> layer |= {"attention_norm": {"scale": jnp.ones(4)}, "mlp_norm": {"scale": jnp.ones(4)}}
    >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layer_0": layer, "norm": {"scale": jnp.ones(4)}}
    >>> config = {"model_type": "llama", "head_dim": 4, "rms_norm_eps": 1e-5}
    >>> tree, _ = to_maxtext(params, config)
    >>> float(tree["params"]["decoder"]["layers"]["self_attention"]["query"]["kernel"][0, 0, 0, 0])
    0.5
    >>> float(from_maxtext(tree, config)["layer_0"]["q_proj"]["kernel"][0, 0])
    1.0
    """
    layout = _layout(config)
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    modules = {theirs: ours for ours, theirs in _MODULES.items()}
    found: dict[str, jax.Array] = {}
    for full, leaf in read_leaves(tree, "tree").items():
        path = _OUTER.sub("", full)
        inside = _LAYER.fullmatch(path)
        if path in outside:
            found[outside[path]] = _put(leaf.read())
        elif inside is None or inside["module"] not in modules:
            raise ValueError(f"{leaf.name} has no place in a model of the type of Llama.")
        else:
            ours, number = f"{modules[inside['module']]}/{inside['kind']}", inside["number"]
            layout.check(leaf, ours, stacked=number is None)
            if number is not None:
                found[f"layer_{number}/{ours}"] = _put(layout.ours(ours, leaf.read()))
            else:
                layers = np.moveaxis(leaf.read(), _AXIS, 0)
                found |= {f"layer_{i}/{ours}": _put(layout.ours(ours, layer)) for i, layer in enumerate(layers)}
    params = as_prefix(found)
    read_llama(params, config)  # whether all of them are there and fit each other
    return params


class _Layout(NamedTuple):
    """How queries and keys are stored: with features that are turned together side by side, divided by a number."""

    head_dim: int
    pairs: bool
    divided: float

    def theirs(self, path: str, values: np.ndarray) -> np.ndarray:
        """One layer's leaf in the layout of MaxText."""
        module, _, kind = path.partition("/")
        if module == "o_proj" and kind == "kernel":
            return values.reshape(-1, self.head_dim, values.shape[-1])
        if module not in ("q_proj", "k_proj", "v_proj"):
            return values
        if module != "v_proj" and self.pairs:
            values = to_pairs(values, self.head_dim)
        if module == "q_proj":
            values = _multiplied(values, 1 / self.divided)
        return values.reshape(*values.shape[:-1], -1, self.head_dim)

    def ours(self, path: str, values: np.ndarray) -> np.ndarray:
        """Undo `theirs`."""
        module, _, kind = path.partition("/")
        if module == "o_proj" and kind == "kernel":
            return values.reshape(-1, values.shape[-1])
        if module not in ("q_proj", "k_proj", "v_proj"):
            return values
        values = values.reshape(*values.shape[:-2], -1)
        if module == "q_proj":
            values = _multiplied(values, self.divided)
        return from_pairs(values, self.head_dim) if module != "v_proj" and self.pairs else values

    def check(self, leaf: Leaf, path: str, *, stacked: bool) -> None:
        """Raise a ValueError where a leaf of theirs, one of `ours` by its path, has other axes than it should."""
        module, _, kind = path.partition("/")
        axes = 1 + (kind == "kernel") + (module in ATTENTION) + stacked
        if len(leaf.shape) != axes:
            raise ValueError(f"{leaf.name} has shape {leaf.shape}; it should have {axes} axes.")
        features = leaf.shape[-2 if module == "o_proj" else -1]
        if module in ATTENTION and features != self.head_dim:
            raise ValueError(f"{leaf.name} has heads of {features} features, config['head_dim'] is {self.head_dim}.")


def _layout(config: Mapping[str, Any]) -> _Layout:
    head_dim, block = read_head_dim(config), _block(config)
    pairs = read_function(config, "MaxText").scaling.get("rope_type") == "llama3"
    return _Layout(head_dim, pairs, head_dim**0.5 if block in _SCALED else 1.0)


def _block(config: Mapping[str, Any]) -> str:
    require_family(config)
    return _BLOCKS[config["model_type"]]


def _overrides(sizes: Sizes, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration that differ from one model to another."""
    function = read_function(config, "MaxText")
    found: dict[str, Any] = {
        "decoder_block": _block(config),
        "base_emb_dim": sizes.width,
        "base_num_query_heads": one_for_all(sizes.heads, "num_attention_heads", "MaxText"),
        "base_num_kv_heads": one_for_all(sizes.kv_heads, "num_key_value_heads", "MaxText"),
        "base_mlp_dim": one_for_all(sizes.inner, "intermediate_size", "MaxText"),
        "base_num_decoder_layers": len(sizes.heads),
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocabulary,
        "mlp_activations": ["silu", "linear"],
        "enable_dropout": False,
        "normalization_layer_epsilon": function.epsilon,
        "logits_via_embedding": sizes.tied,
        "normalize_embedding_logits": False,
        "attention_bias": bool(sizes.biases),
        "use_qk_norm": sizes.head_norms,
        "rope_type": "default",
    }
    if function.base != int(function.base):
        raise ValueError(f"config has the base {function.base} of rotations; MaxText takes a whole number.")
    found["rope_max_timescale"] = int(function.base)
    kind = function.scaling.get("rope_type")
    if kind == "linear":
        found["rope_linear_scaling_factor"] = float(function.scaling["factor"])
    elif kind == "llama3" and {name: function.scaling.get(name) for name in _LLAMA3} == _LLAMA3:
        found |= {"rope_type": "llama3.1", "rope_use_scale": True}
    elif kind is not None:
        raise ValueError(
            f"config has rotations scaled by {function.scaling}; MaxText knows those of llama3 with {_LLAMA3}."
        )
    return found


def _multiplied(values: np.ndarray, factor: float) -> np.ndarray:
    """Multiply in at least 32 bits, and return to the dtype."""
    if factor == 1:
        return values
    return (values.astype(np.result_type(values.dtype, np.float32)) * factor).astype(values.dtype)


def _put(values: np.ndarray) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(values))
