"""What a rule sees of each prunable leaf, and the strength that belongs to it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from jaxprune._dtypes import widen
from jaxprune._tree._paths import flatten, spread


@dataclasses.dataclass(frozen=True)
class Layer:
    """A prunable leaf as a rule sees it: an array of scores, with what the array alone does not tell.

    To ``jax.tree.map`` a layer is a node around its `score`, so that a rule of your own may treat the tree of scores
    as a tree of arrays.

    Attributes:
        path: the normalised path, ``block/dense/kernel``.
        name: the leaf's name in messages, ``params['block']['dense']['kernel']``.
        values: the scores, or the weights themselves where their magnitude is the score; any floating dtype.
        magnitude: whether `values` are weights, ranked by magnitude. Keeping the weights spares a copy of the tree
            in float32 and lets a rule measure them (a standard deviation needs their signs).
        stack: how many leading axes count layers.
        pooled: the shape of one layer's weights where `values` are scores of groups of them (channels, blocks).
    """

    path: str
    name: str
    values: jax.Array
    magnitude: bool = False
    stack: int = 0
    pooled: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's weights."""
        return self.values.shape[self.stack :] if self.pooled is None else self.pooled

    @property
    def score(self) -> jax.Array:
        """The scores in float32 (float64 stays), larger = keep."""
        values = widen(jnp.asarray(self.values))
        return jnp.abs(values) if self.magnitude else values

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one layer."""
        return tuple(range(self.stack, len(self.values.shape)))

    @property
    def size(self) -> int:
        """The number of scores of one layer."""
        return math.prod(self.values.shape[self.stack :])


# What a layer is besides its scores: path, name, stack, pooled.
_Known = tuple[str, str, int, tuple[int, ...] | None]


def _flatten_layer(
    layer: Layer,
) -> tuple[tuple[tuple[GetAttrKey, jax.Array]], _Known]:
    # Mapped over by a rule, a layer holds its mask.
    child = layer.score if jnp.issubdtype(layer.values.dtype, jnp.floating) else layer.values
    return ((GetAttrKey("value"), child),), (layer.path, layer.name, layer.stack, layer.pooled)


def _unflatten_layer(aux: _Known, children: Iterable[Any]) -> Layer:
    path, name, stack, pooled = aux
    (values,) = children
    return Layer(path, name, values, stack=stack, pooled=pooled)


jax.tree_util.register_pytree_with_keys(Layer, _flatten_layer, _unflatten_layer)


def read_layers(scores: Any) -> tuple[list[Layer], Callable[[Sequence[Any]], Any]]:
    """Read a tree of scores (bare arrays or Layers) and return its layers and the way to build a tree of masks."""
    flat = flatten(scores, "scores", is_leaf=lambda node: isinstance(node, Layer))
    layers = [
        leaf if isinstance(leaf, Layer) else Layer(path, name, jnp.asarray(leaf))
        for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True)
    ]
    for layer in layers:
        if not jnp.issubdtype(layer.values.dtype, jnp.floating):
            raise TypeError(f"{layer.name} has dtype {layer.values.dtype}; scores are floating-point numbers.")
    return layers, lambda masks: jax.tree.unflatten(flat.treedef, masks)


def strengths(k: Any, layers: Sequence[Layer], rule: str, low: float = 0.0, high: float = math.inf) -> list[Any]:
    """Give each layer its `k`, checked as far as its value is known, in the shape of the layer's stack.

    Args:
        k: a number, a scalar array (may be traced), or a tree prefix of these; an entry for stacked layers may also
            have the shape of the stack.
        layers: the layers it is for.
        rule: the rule's name for messages.
        low: the smallest k allowed.
        high: the largest k allowed; infinity itself is refused.

    Returns:
        One entry a layer: a Python float where k was a number, else an array of shape ``()`` or the stack's.
    """
    paths = [layer.path for layer in layers]
    entries = [k] * len(layers) if is_scalar(k) else spread(k, paths, "k")
    return [_strength(entry, layer, rule, low, high) for entry, layer in zip(entries, layers, strict=True)]


def is_scalar(k: Any) -> bool:
    """Whether k is one strength rather than a tree of them; raise a TypeError for what can be neither."""
    if isinstance(k, str | bytes | bool) or k is None:
        raise TypeError(f"k is a number, a scalar array or a tree prefix of these, not {k!r}.")
    if isinstance(k, np.ndarray | np.generic | jax.Array):
        if not (jnp.issubdtype(k.dtype, jnp.integer) or jnp.issubdtype(k.dtype, jnp.floating)):
            raise TypeError(f"k is a number, a scalar array or a tree prefix of these, not an array of {k.dtype}.")
        return True
    return isinstance(k, int | float)


def _strength(k: Any, layer: Layer, rule: str, low: float, high: float) -> Any:
    if k is None:
        raise ValueError(f"k has no entry for {layer.name}; it must be one number or a tree prefix that covers it.")
    try:
        number = is_scalar(k)
    except TypeError:
        number = False
    if not number:
        raise TypeError(f"k for {layer.name} is a number or a scalar array, not {k!r}.")
    stack = layer.values.shape[: layer.stack]
    if np.shape(k) not in ((), stack):
        raise ValueError(
            f"k for {layer.name} has shape {np.shape(k)}; it must be a scalar"
            + (f" or of shape {stack}, one for each stacked layer." if stack else ".")
        )
    if not isinstance(k, jax.core.Tracer):
        values = np.asarray(k, np.float64)
        if not ((low <= values) & (values <= high) & np.isfinite(values)).all():
            allowed = f"k >= {low:g}" if math.isinf(high) else f"{low:g} <= k <= {high:g}"
            raise ValueError(f"{rule} takes {allowed}, finite; got k = {k} for {layer.name}.")
        if values.ndim == 0:
            return float(values)
    return jnp.asarray(k)
