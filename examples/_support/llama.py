"""Llama in plain Flax Linen: a loop of layers, or the same in a scan; with a cache of keys and values for decoding."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# Keys and values [batch, length, kv_heads, head_dim].
Cache = tuple[jax.Array, jax.Array]


# One for all layers, or one for each.
Sizes = int | tuple[int, ...]


class Config(NamedTuple):
    """What a Llama is made of; in a scan all layers have the same sizes."""

    vocabulary: int
    width: int
    layers: int
    heads: Sizes
    kv_heads: Sizes
    head_dim: int
    inner: Sizes
    rope_base: float = 100_000.0
    epsilon: float = 1e-5

    def of_layer(self, number: int) -> "Config":
        """Return what a layer is made of: each size as one number."""
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "inner": self.inner}
        return self._replace(**{name: size if isinstance(size, int) else size[number] for name, size in sizes.items()})


class Block(nn.Module):
    """Attention of grouped queries and a gated perceptron, each behind a norm and beside a shortcut."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, cache: Cache | None, start: jax.Array | int) -> tuple[jax.Array, Cache | None]:
        """Map the tokens from position `start` on, [batch, time, width], to the same shape, and the cache to what follows."""
        c = self.config
        h = nn.RMSNorm(c.epsilon, name="attention_norm")(x)
        query, key, value = (
            nn.Dense(heads * c.head_dim, use_bias=False, name=name)(h).reshape(*h.shape[:-1], heads, c.head_dim)
            for name, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads), ("v_proj", c.kv_heads))
        )
        positions = start + jnp.arange(x.shape[1])
        query, key = rotate(query, positions, c.rope_base), rotate(key, positions, c.rope_base)
        if cache is None:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
                for old, new in zip(cache, (key, value), strict=True)
            )
            seen = jnp.arange(cache[0].shape[1])[None] <= positions[:, None]
            mixed = jax.nn.dot_product_attention(query, *cache, mask=seen[None, None])
        x += nn.Dense(c.width, use_bias=False, name="o_proj")(mixed.reshape(*x.shape[:-1], -1))
        h = nn.RMSNorm(c.epsilon, name="mlp_norm")(x)
        gate, up = (nn.Dense(c.inner, use_bias=False, name=name)(h) for name in ("gate_proj", "up_proj"))
        return x + nn.Dense(c.width, use_bias=False, name="down_proj")(nn.silu(gate) * up), cache


class Llama(nn.Module):
    """A language model whose table of tokens is its head, too."""

    config: Config
    scan: bool = False

    def setup(self) -> None:
        """Name the parts: `layer_0`, `layer_1`, ... or, stacked, `layers`."""
        c = self.config
        self.embed = nn.Embed(c.vocabulary, c.width)
        if self.scan:
            of_layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": c.layers}
            self.layers = nn.scan(Block, in_axes=(0, nn.broadcast), **of_layers)(c)
        else:
            self.blocks = [Block(c.of_layer(i), name=f"layer_{i}") for i in range(c.layers)]
        self.norm = nn.RMSNorm(c.epsilon)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [batch, time] to logits of the next ones, [batch, time, vocabulary]."""
        return self.embed.attend(self.hidden(tokens))

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [batch, time] to what the head reads, [batch, time, width]."""
        return self._run(tokens, None, 0)[0]

    def decode(self, tokens: jax.Array, start: jax.Array | int, caches: Any) -> tuple[jax.Array, Any]:
        """Map the tokens from position `start` on, [batch, time], and the caches of those before to logits and caches."""
        hidden, caches = self._run(tokens, caches, start)
        return self.embed.attend(hidden), caches

    def _run(self, tokens: jax.Array, caches: Any, start: jax.Array | int) -> tuple[jax.Array, Any]:
        x = self.embed(tokens)
        if self.scan:
            x, caches = self.layers(x, caches, start)
        else:
            of_layers = [None] * len(self.blocks) if caches is None else caches
            found = []
            for block, cache in zip(self.blocks, of_layers, strict=True):
                x, cache = block(x, cache, start)
                found.append(cache)
            caches = found
        return self.norm(x), caches


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Turn the two halves of each head by angles that grow with the position (Su et al. 2021).

    Args:
      x: [batch, time, heads, head_dim].
      positions: [time].
      base: of the wavelengths.

    Returns:
      The shape of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    cos, sin = (turn(angles)[None, :, None].astype(x.dtype) for turn in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def stack(params: Any) -> Any:
    """Return the parameters of a loop of layers as those of the scan."""
    count = sum(name.startswith("layer_") for name in params)
    layers = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *(params[f"layer_{i}"] for i in range(count)))
    return {name: leaf for name, leaf in params.items() if not name.startswith("layer_")} | {"layers": layers}


def number_layers(params: Any, config: Config) -> tuple[Any, Config]:
    """Return the parameters of a loop from which layers were cut with the layers counted anew, and the sizes of each."""
    names = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name.split("_")[1]))
    layers = [params[name] for name in names if jax.tree.leaves(params[name])]  # of one that went nothing is left
    heads, kv_heads = (
        tuple(layer[name]["kernel"].shape[1] // config.head_dim for layer in layers) for name in ("q_proj", "k_proj")
    )
    inner = tuple(layer["gate_proj"]["kernel"].shape[1] for layer in layers)
    renamed = {f"layer_{i}": layer for i, layer in enumerate(layers)}
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    return rest | renamed, config._replace(layers=len(layers), heads=heads, kv_heads=kv_heads, inner=inner)


def empty_caches(config: Config, batch: int, length: int, *, scan: bool = False, dtype: Any = jnp.float32) -> Any:
    """Return caches of so many positions: a pair for each layer, or one pair whose first axis counts the layers."""
    shapes = [(batch, length, config.of_layer(i).kv_heads, config.head_dim) for i in range(config.layers)]
    if scan:
        return tuple(jnp.zeros((config.layers, *shapes[0]), dtype) for _ in range(2))
    return [tuple(jnp.zeros(shape, dtype) for _ in range(2)) for shape in shapes]


def generate(network: Llama, params: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Return the likeliest next tokens, one after the other, each by one step on the cache."""
    dtype = params["norm"]["scale"].dtype
    caches = empty_caches(network.config, 1, len(prompt) + count, scan=network.scan, dtype=dtype)
    tokens, start = jnp.array([prompt], jnp.int32), 0
    found: list[int] = []
    for _ in range(count):
        following, caches = _decode(network, params, tokens, jnp.int32(start), caches)
        start += tokens.shape[1]
        tokens = following
        found.append(int(tokens[0, 0]))
    return found


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode(network: Llama, params: Any, tokens: jax.Array, start: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
    logits, caches = network.apply({"params": params}, tokens, start, caches, method="decode")
    return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), caches
