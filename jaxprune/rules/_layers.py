"""What a rule sees of each prunable leaf, and the strength that belongs to it."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from jaxprune._dtypes import widen
from jaxprune._selection._alike import Kind
from jaxprune._tree._axes import Axes, conventional
from jaxprune._tree._leaves import is_known
from jaxprune._tree._paths import flatten, spread
from jaxprune.rules._rule import Rule

_SAY_WHICH = (
    "Let the function say which axis is which, by sites=jaxprune.find_sites(...), name it by the rule's axis=, or leave this "
    "parameter dense with prunable=..."
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A prunable leaf as a rule sees it: an array of scores, with what the array alone does not tell.

    To ``jax.tree.map`` a layer is a node around its `score`, so that a rule of your own may treat the tree of scores
    as a tree of arrays.

    Attributes:
        path: the normalised path, ``block/dense/kernel``.
        name: the leaf's name in messages, ``params['block']['dense']['kernel']``.
        values: the scores, or the weights themselves where their magnitude is the score; any floating dtype, of weights
            also complex.
        roles: what its axes are.
        magnitude: whether `values` are weights, ranked by magnitude. Keeping the weights spares a copy of the tree
            in float32 and lets a rule measure them (a standard deviation needs their signs).
        pooled: the shape of one layer's weights where `values` are scores of groups of them (channels, blocks).
    """

    path: str
    name: str
    values: jax.Array
    roles: Axes
    magnitude: bool = False
    pooled: tuple[int, ...] | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that count layers."""
        return self.roles.stack

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """How many layers there are along each of these axes."""
        return tuple(self.values.shape[axis] for axis in self.stack)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one layer."""
        return tuple(axis for axis in range(len(self.values.shape)) if axis not in self.stack)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one layer's weights."""
        return tuple(self.values.shape[axis] for axis in self.axes) if self.pooled is None else self.pooled

    @property
    def score(self) -> jax.Array:
        """The scores in float32 (float64 stays), larger = keep."""
        values = widen(jnp.asarray(self.values))
        return jnp.abs(values) if self.magnitude else values

    @property
    def size(self) -> int:
        """The number of scores of one layer."""
        return math.prod(self.values.shape[axis] for axis in self.axes)

    @property
    def depth(self) -> int:
        """The number of layers."""
        return math.prod(self.stack_shape)

    @property
    def kind(self) -> Kind:
        """What layers have in common that one program can treat: all that is known of them, and the name but for numbers."""
        numbered = re.sub(r"\d+", "#", self.path)
        sharding = self.values.sharding if is_known(self.values) else jax.typeof(self.values).sharding
        return numbered, self.values.shape, self.values.dtype, sharding, self.roles, self.magnitude

    def input_axis(self, title: str, axis: int | None = None) -> int:
        """Return the axis of the leaf along which neighbouring inputs lie, or where a given axis of one layer lies."""
        if axis is not None:
            return self._own(axis, title)
        if self.roles.inputs is None:
            raise ValueError(f"{title} groups weights along the inputs, but {self.name} {self.roles.why}. {_SAY_WHICH}")
        return self.roles.inputs

    def output_axes(self, title: str, axis: int | None = None) -> tuple[int, ...]:
        """Return the axes of the leaf that number the output units, or where a given axis of one layer lies."""
        if axis is not None:
            return (self._own(axis, title),)
        if self.roles.outputs is None:
            raise ValueError(f"{title} looks at output units, but {self.name} {self.roles.why}. {_SAY_WHICH}")
        return self.roles.outputs

    def spread(self, of_layers: jax.Array) -> jax.Array:
        """Shape what is one number for all layers, or one for each, to be combined with `values`."""
        return jnp.expand_dims(of_layers, self.axes) if jnp.ndim(of_layers) else of_layers

    def _own(self, axis: int, title: str) -> int:
        axes = self.axes
        if not -len(axes) <= axis < len(axes):
            raise ValueError(
                f"{title} was given axis {axis}, but {self.name} has shape {self.shape}. "
                "Choose another axis, or leave this parameter dense with prunable=..."
            )
        return axes[axis]


# What a layer is besides its scores: path, name, roles, pooled.
_Known = tuple[str, str, Axes, tuple[int, ...] | None]


def _flatten_layer(
    layer: Layer,
) -> tuple[tuple[tuple[GetAttrKey, jax.Array]], _Known]:
    # Mapped over by a rule, a layer holds its mask.
    child = layer.score if jnp.issubdtype(layer.values.dtype, jnp.inexact) else layer.values
    return ((GetAttrKey("value"), child),), (layer.path, layer.name, layer.roles, layer.pooled)


def _unflatten_layer(aux: _Known, children: Iterable[Any]) -> Layer:
    path, name, roles, pooled = aux
    (values,) = children
    return Layer(path, name, values, roles, pooled=pooled)


jax.tree_util.register_pytree_with_keys(Layer, _flatten_layer, _unflatten_layer)


def read_layers(scores: Any) -> tuple[list[Layer], Callable[[Sequence[Any]], Any]]:
    """Read a tree of scores (bare arrays or Layers) and return its layers and the way to build a tree of masks."""
    tree = flatten(scores, "scores", is_leaf=lambda node: isinstance(node, Layer))
    layers = [
        leaf if isinstance(leaf, Layer) else Layer(path, name, jnp.asarray(leaf), conventional(path, jnp.shape(leaf)))
        for path, name, leaf in zip(tree.paths, tree.names, tree.leaves, strict=True)
    ]
    for layer in layers:
        if not jnp.issubdtype(layer.values.dtype, jnp.inexact if layer.magnitude else jnp.floating):
            raise TypeError(f"{layer.name} has dtype {layer.values.dtype}; scores are floating-point numbers.")
    return layers, tree.build


def strengths(k: Any, layers: Sequence[Layer], rule: Rule) -> list[Any]:
    """Give each layer its `k`, checked as far as its value is known, in the shape of the layer's stack.

    Args:
        k: a number, a scalar array (may be traced), or a tree prefix of these; an entry for stacked layers may also
            have the shape of the stack.
        layers: the layers it is for.
        rule: says which k it takes.

    Returns:
        One entry a layer: a Python float where k was a number, else an array of shape ``()`` or the stack's.
    """
    entries = [k] * len(layers) if is_scalar(k) else spread(k, [layer.path for layer in layers], "k")
    return [_strength(entry, layer, rule) for entry, layer in zip(entries, layers, strict=True)]


def is_scalar(k: Any) -> bool:
    """Whether k is one strength rather than a tree of them; raise a TypeError for what can be neither."""
    if isinstance(k, str | bytes | bool) or k is None:
        raise TypeError(f"k is a number, a scalar array or a tree prefix of these, not {k!r}.")
    if isinstance(k, np.ndarray | np.generic | jax.Array):
        if not (jnp.issubdtype(k.dtype, jnp.integer) or jnp.issubdtype(k.dtype, jnp.floating)):
            raise TypeError(f"k is a number, a scalar array or a tree prefix of these, not an array of {k.dtype}.")
        return True
    return isinstance(k, int | float)


def _strength(k: Any, layer: Layer, rule: Rule) -> Any:
    if k is None:
        raise ValueError(f"k has no entry for {layer.name}; it must be one number or a tree prefix that covers it.")
    try:
        number = is_scalar(k)
    except TypeError:
        number = False
    if not number:
        raise TypeError(f"k for {layer.name} is a number or a scalar array, not {k!r}.")
    stack = layer.stack_shape
    if np.shape(k) not in ((), stack):
        raise ValueError(
            f"k for {layer.name} has shape {np.shape(k)}; it must be a scalar"
            + (f" or of shape {stack}, one for each stacked layer." if stack else ".")
        )
    if isinstance(k, jax.core.Tracer):
        return k
    check_strength(k, rule, layer.name)
    return float(k) if np.ndim(k) == 0 else jnp.asarray(k)


def check_strength(k: Any, rule: Rule, name: str) -> None:
    """Raise a ValueError where a known k, one or several, is none that the rule takes; `name` is what it is for."""
    values = np.asarray(k, np.float64)
    if not ((rule.low <= values) & (values <= rule.high) & np.isfinite(values)).all():
        raise ValueError(f"{rule.name} takes {rule.allowed}, finite; got k = {k} for {name}.{_meaning(rule)}")
    if rule.whole and (values != np.floor(values)).any():
        raise ValueError(f"{rule.name} takes a whole number, not k = {k} ({name}).{_meaning(rule)}")


def _meaning(rule: Rule) -> str:
    if not rule.strength:
        return ""
    unit = ", not a percentage: 90 % is 0.9" if rule.counts else ", a whole number" if rule.whole else ""
    return f" Its k is {rule.strength}{unit}."
