"""Llama-type models of every class, small, and what they compute: from the equations, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A configuration for each class, two layers, heads that share keys and values.
CONFIG = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": CONFIG | {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "llama with biases": CONFIG | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": CONFIG | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": CONFIG | {"model_type": "mistral", "head_dim": 6, "sliding_window": None},
    "qwen2": CONFIG | {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 3},
    "qwen3": CONFIG | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
}
TOKENS = np.random.default_rng(1).integers(0, 20, (2, 7)).astype(np.int32)


def make(config: dict[str, Any], *, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random parameters of a configuration, written out from the definition of each class."""
    rng = np.random.default_rng(seed)
    kind, width, inner, dim = (config[name] for name in ("model_type", "hidden_size", "intermediate_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {"q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width)}
    shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    biased = {"llama": "qkvo" if config.get("attention_bias") else "", "qwen2": "qkv"}.get(kind, "")
    biased = [*biased, *(("gate", "up", "down") if config.get("mlp_bias") else ())]

    def array(*shape: int, mean: float = 0.0) -> jax.Array:
        return jnp.asarray(mean + rng.normal(0, 0.4, shape), dtype)

    def layer() -> dict[str, Any]:
        found: dict[str, Any] = {name: {"scale": array(width, mean=1.0)} for name in ("attention_norm", "mlp_norm")}
        for name, shape in shapes.items():
            found[f"{name}_proj"] = {"kernel": array(*shape)}
            if name in biased:
                found[f"{name}_proj"]["bias"] = array(shape[1])
        if kind == "qwen3":
            found |= {name: {"scale": array(dim, mean=1.0)} for name in ("q_norm", "k_norm")}
        return found

    params: dict[str, Any] = {f"layer_{i}": layer() for i in range(config["num_hidden_layers"])}
    params |= {"embed": {"embedding": array(config["vocab_size"], width)}, "norm": {"scale": array(width, mean=1.0)}}
    if not config.get("tie_word_embeddings"):
        params["head"] = {"kernel": array(width, config["vocab_size"])}
    return params


def logits(params: Any, config: dict[str, Any], tokens: Any) -> jax.Array:
    """Of tokens [batch, time], those of the next ones [batch, time, vocabulary]; widths are those of the arrays."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    dim, epsilon = config["head_dim"], config["rms_norm_eps"]
    base = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    positions = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    angles = positions[:, None] * (base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim))[None]
    turn = jax.lax.complex(jnp.cos(angles), jnp.sin(angles))[None, :, None]
    later = positions[:, None] < positions[None]

    def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + epsilon) * scale.reshape((1,) * (x.ndim - 1) + (-1,))

    def dense(module: Any, x: jax.Array) -> jax.Array:
        y = x @ module["kernel"]
        return y + module["bias"][None, None] if "bias" in module else y

    def rotated(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        turned = jax.lax.complex(first, second) * turn
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    names = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    x = params["embed"]["embedding"][tokens]
    for layer in map(params.get, names):
        h = norm(layer["attention_norm"]["scale"], x)
        q, k, v = (dense(layer[f"{name}_proj"], h).reshape(*h.shape[:2], -1, dim) for name in "qkv")
        if "q_norm" in layer:
            q, k = norm(layer["q_norm"]["scale"], q), norm(layer["k_norm"]["scale"], k)
        q, k = rotated(q), rotated(k)
        shared = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, shared, axis=2), jnp.repeat(v, shared, axis=2)
        weights = jnp.einsum("bthd,bshd->bhts", q, k) / dim**0.5
        weights = jax.nn.softmax(jnp.where(later[None, None], -jnp.inf, weights), axis=-1)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*h.shape[:2], -1)
        x = x + dense(layer["o_proj"], mixed)
        h = norm(layer["mlp_norm"]["scale"], x)
        x = x + dense(layer["down_proj"], jax.nn.silu(dense(layer["gate_proj"], h)) * dense(layer["up_proj"], h))
    head = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
    return norm(params["norm"]["scale"], x) @ head


def cut(params: Any, config: dict[str, Any], *, drop: int, inner: int, groups: int) -> Any:
    """Without a layer, with so many channels of perceptrons and so many heads of keys with their queries, each layer its own."""
    dim, rng = config["head_dim"], np.random.default_rng(0)
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    smaller = {name: value for name, value in params.items() if name != f"layer_{drop}"}
    for name, layer in smaller.items():
        if not name.startswith("layer_"):
            continue
        channels = np.sort(rng.permutation(config["intermediate_size"])[:inner])
        heads = np.sort(rng.permutation(config["num_key_value_heads"])[:groups])
        keys = (heads[:, None] * dim + np.arange(dim)[None]).ravel()
        queries = (heads[:, None] * shared * dim + np.arange(shared * dim)[None]).ravel()
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": channels, "up_proj": channels}
        inputs = {"o_proj": queries, "down_proj": channels}
        layer = {module: dict(leaves) for module, leaves in layer.items()}
        for module, kept in outputs.items():
            layer[module] = {leaf: array[..., kept] for leaf, array in layer[module].items()}
        for module, kept in inputs.items():
            layer[module]["kernel"] = layer[module]["kernel"][kept]
        smaller[name] = layer
    return smaller


def stack(params: Any) -> Any:
    """The same with its layers stacked."""
    names = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    layers = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *(params[name] for name in names))
    return {name: leaf for name, leaf in params.items() if name not in names} | {"layers": layers}
