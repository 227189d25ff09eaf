"""Rules over groups of weights: N of every M, whole channels, blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import with_infinities
from jaxprune._tree._axes import Axes
from jaxprune._tree._given import described
from jaxprune._tree._sharding import sharded_as, without_explicit_axes
from jaxprune.rules._layers import Layer, read_layers, strengths
from jaxprune.rules._rule import AnyRule, Rule, as_rule
from jaxprune.scores._channels import channel_norm

# Scores of the channels of one kernel: (kernel, the axes to reduce) -> one score a channel.
Norm = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def n_m(m: int, *, axis: int | None = None) -> Rule:
    """Make the rule that keeps the k largest of every m consecutive weights along the inputs (N:M, N = k).

    Exact: every group keeps k weights, whatever the ties (among equals the lower index is kept) and the dtype; NaN
    ranks lowest. Groups run along the contraction, as sparse matrix units need: axis -2 of a Flax or Haiku kernel, the
    input of an attention projection, axis 1 of an Equinox or PyTorch ``weight``. Costs m (m - 1) / 2 compares and no sort.

    Args:
        m: the size of a group, >= 1.
        axis: the axis of one layer along which groups run; None takes the inputs, as the ``sites=`` of `make_masks` know
            them, or else by the names of frameworks.

    Returns:
        A rule ``(scores, k) -> masks``, with k a whole number, 1 <= k <= m (may be traced).

    Raises:
        ValueError: m < 1; by the rule: k is not within 1 to m, or an axis does not exist or divide into groups of m, or
            neither sites, axis, name nor shape tells which axis is inputs (a transposed convolution, an einsum).

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0], [4.0], [3.0], [2.0]])}
    >>> jaxprune.make_masks(params, 2, rule=n_m(4))["kernel"].ravel().tolist()
    [False, True, True, False]

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3; Zhou et al., "Learning N:M
    Fine-grained Structured Sparse Neural Networks From Scratch", 2021.
    """
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ValueError(f"rules.n_m takes the size of a group, a whole number >= 1; got {m!r}.")
    return Rule(
        _n_m,
        f"rules.n_m({m})",
        scope="group",
        strength=f"how many of every {m} weights are kept",
        low=1.0,
        high=float(m),
        whole=True,
        rises=False,
        settings=(*((("axis", axis),) if axis is not None else ()), ("m", m)),
    )


def _n_m(scores: Any, k: Any, *, m: int, axis: int | None = None) -> Any:
    """Keep the k largest of every m weights, a `n_m` with settings."""
    rule = n_m(m, axis=axis)
    layers, build = read_layers(scores)
    masks = []
    for layer, n in zip(layers, strengths(k, layers, rule), strict=True):
        along = layer.input_axis(rule.name, axis)
        if layer.values.shape[along] % m:
            raise ValueError(
                f"{rule.name} groups weights by {m} along axis {along - layer.values.ndim}, but {layer.name} has shape "
                f"{layer.values.shape}. Choose another axis, or leave this parameter dense with prunable=..."
            )
        masks.append(_keep_n(layer.values, layer.spread(jnp.asarray(n)), m=m, axis=along, magnitude=layer.magnitude))
    return build(masks)


@functools.partial(jax.jit, static_argnames=("m", "axis", "magnitude"))
def _keep_n(values: jax.Array, n: Any, *, m: int, axis: int, magnitude: bool) -> jax.Array:
    def keep(values: jax.Array, n: jax.Array) -> jax.Array:
        shape = values.shape
        members = jnp.split(values.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :]), m, axis + 1)
        members = [jnp.where(jnp.isnan(x), -jnp.inf, jnp.abs(x) if magnitude else x) for x in members]
        # A member's place is the number of members that beat it; among equals the earlier one wins.
        places = [jnp.zeros(members[0].shape, jnp.uint8 if m < 256 else jnp.int32) for _ in members]
        for i in range(m):
            for j in range(i + 1, m):
                later_wins = members[j] > members[i]
                places[i] += later_wins.astype(places[i].dtype)
                places[j] += (~later_wins).astype(places[j].dtype)
        n = jnp.expand_dims(n, axis) if n.ndim else n
        return jnp.concatenate([place < n for place in places], axis + 1).reshape(shape)

    values = with_infinities(jax.lax.stop_gradient(values))
    if values.size == 0:
        return jnp.ones_like(values, dtype=bool)
    n = jnp.asarray(n).astype(jnp.uint8 if m < 256 else jnp.int32)
    return without_explicit_axes(keep, values)(values, n)


def channels(rule: AnyRule, *, axis: int | None = None, norm: Norm = channel_norm) -> Rule:
    """Make the rule that keeps or removes whole channels, chosen by `rule` from one score a channel.

    Every guarantee of `rule` holds for channels: ``channels(layer_sparsity)`` removes exactly ``round(k * c)`` of the c
    channels of every layer and never the last one.

    Args:
        rule: any rule; it sees a vector of channel scores where the kernel was.
        axis: the axis of one layer that numbers the channels; None takes the output units (filters).
        norm: ``(kernel of one layer, axes) -> scores of its channels``, reducing the axes: `scores.channel_norm` (l2),
            `scores.fpgm`, or `jnp.mean` for scores given to `make_masks`, which take the kernel's place.

    Returns:
        A rule ``(scores, k) -> masks``.

    Raises:
        ValueError: by the rule, when a layer has no such axis, or nothing tells which axes are output units; and whatever
            `rule` raises.

    >>> import jax.numpy as jnp, jaxprune
    >>> from jaxprune import rules
    >>> params = {"kernel": jnp.array([[1.0, 3.0], [1.0, 3.0]])}
    >>> jaxprune.make_masks(params, 0.5, rule=channels(rules.layer_sparsity))["kernel"].tolist()
    [[False, True], [False, True]]

    Reference: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", 2017, section 3.1.
    """
    inner = as_rule(rule)
    if not callable(norm):
        raise TypeError(
            f"norm is {described(norm)}, not a function (kernel, axes) -> scores of its channels, such as "
            "scores.channel_norm, functools.partial(scores.channel_norm, ord=1) or scores.fpgm."
        )
    settings = (("axis", axis), ("norm", norm), ("rule", inner))
    return dataclasses.replace(
        inner, function=_channels, name=f"rules.channels({inner.name})", grain="channel", settings=settings
    )


def _channels(scores: Any, k: Any, *, rule: Rule, axis: int | None, norm: Norm) -> Any:
    """Keep or remove whole channels, a `channels` with settings."""

    def kept(layer: Layer) -> tuple[int, ...]:
        return layer.output_axes("rules.channels", axis)

    def pooled(layer: Layer) -> Layer:
        axes = tuple(place for place, a in enumerate(layer.axes) if a not in kept(layer))

        def score(kernel: jax.Array) -> jax.Array:
            return norm(kernel, axes)

        for _ in layer.stack:
            score = jax.vmap(score)
        first = tuple(range(len(layer.stack)))
        values = score(jnp.moveaxis(jax.lax.stop_gradient(layer.values), layer.stack, first))
        roles = Axes(first, None, tuple(range(len(first), values.ndim)), "is channels, which have no inputs")
        return dataclasses.replace(layer, values=values, roles=roles, magnitude=False, pooled=layer.shape)

    def spread(mask: jax.Array, layer: Layer) -> jax.Array:
        axes = (*layer.stack, *kept(layer))
        gone = [a for a in range(layer.values.ndim) if a not in axes]
        in_order = jnp.transpose(mask, sorted(range(len(axes)), key=axes.__getitem__))
        return sharded_as(jnp.broadcast_to(jnp.expand_dims(in_order, gone), layer.values.shape), layer.values)

    return _grouped(rule, scores, k, pooled, spread)


def blocks(rule: AnyRule, shape: tuple[int, ...], *, reduce: Callable[..., jax.Array] = jnp.mean) -> Rule:
    """Make the rule that keeps or removes blocks of weights, chosen by `rule` from one score a block.

    Blocks tile the last axes of each layer (of a Flax kernel: inputs and outputs, at every tap of a convolution; of an
    Equinox ``weight`` with a block of two: outputs and inputs). Where an axis does not divide, the blocks at its end
    are smaller and scored over the weights they have. Every guarantee of `rule` holds for blocks.

    Args:
        rule: any rule; it sees an array of block scores where the kernel was.
        shape: the block's shape, for the last ``len(shape)`` axes of one layer.
        reduce: the score of a block from those of its weights: a reduction with arguments ``axis`` and ``where``, such
            as `jnp.mean`, `jnp.sum`, or ``functools.partial(jnp.max, initial=0)``.

    Returns:
        A rule ``(scores, k) -> masks``.

    Raises:
        ValueError: a block side is not a whole number >= 1; by the rule, when a layer has too few axes.

    >>> import jax.numpy as jnp, jaxprune
    >>> from jaxprune import rules
    >>> params = {"kernel": jnp.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0]])}
    >>> jaxprune.make_masks(params, 0.5, rule=blocks(rules.layer_sparsity, (2, 2)))["kernel"].tolist()
    [[False, False, True], [False, False, True]]

    Reference: Narang, Undersander, Diamos, "Block-Sparse Recurrent Neural Networks", 2017.
    """
    if not shape or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in shape):
        raise ValueError(f"rules.blocks takes a tuple of whole numbers >= 1 as the block's shape; got {shape!r}.")

    inner = as_rule(rule)
    settings = (("reduce", reduce), ("rule", inner), ("shape", tuple(shape)))
    return dataclasses.replace(
        inner, function=_blocks, name=f"rules.blocks({inner.name})", grain="block", settings=settings
    )


def _blocks(scores: Any, k: Any, *, rule: Rule, shape: tuple[int, ...], reduce: Callable[..., jax.Array]) -> Any:
    """Keep or remove blocks, a `blocks` with settings."""

    def tiled(layer: Layer) -> list[tuple[int, int]]:
        """For each axis of the leaf the side of a block and the number of blocks."""
        own = layer.axes
        if len(shape) > len(own):
            raise ValueError(
                f"rules.blocks was given blocks of shape {shape}, but {layer.name} has shape {layer.shape}. "
                "Leave this parameter dense with prunable=..."
            )
        # A convolution whose units come first, as Equinox keeps it, has its taps last.
        taps_last = len(shape) == 2 and len(own) > 2 and layer.roles.outputs == own[:1]
        along = own[:2] if taps_last else own[len(own) - len(shape) :]
        sides = dict(zip(along, shape, strict=True))
        return [(sides.get(axis, 1), math.ceil(n / sides.get(axis, 1))) for axis, n in enumerate(layer.values.shape)]

    def pooled(layer: Layer) -> Layer:
        tiles = tiled(layer)

        def score(values: jax.Array) -> jax.Array:
            full = [side * count for side, count in tiles]
            padding = [(0, n - m) for n, m in zip(full, values.shape, strict=True)]
            split = [n for side, count in tiles for n in (count, side)]
            real = jnp.pad(jnp.ones_like(values, dtype=bool), padding).reshape(split)
            return reduce(jnp.pad(values, padding).reshape(split), axis=tuple(range(1, len(split), 2)), where=real)

        counts = tuple(count for _, count in tiles)
        values = without_explicit_axes(score, layer.values, counts)(layer.score)
        return dataclasses.replace(layer, values=values, magnitude=False, pooled=layer.shape)

    def spread(mask: jax.Array, layer: Layer) -> jax.Array:
        tiles = tiled(layer)

        def expand(mask: jax.Array) -> jax.Array:
            for axis, (side, _) in enumerate(tiles):
                mask = jnp.repeat(mask, side, axis) if side > 1 else mask
            return jax.lax.slice(mask, [0] * mask.ndim, layer.values.shape)

        return sharded_as(without_explicit_axes(expand, layer.values)(mask), layer.values)

    return _grouped(rule, scores, k, pooled, spread)


def _grouped(
    rule: Rule,
    scores: Any,
    k: Any,
    pooled: Callable[[Layer], Layer],
    spread: Callable[[jax.Array, Layer], jax.Array],
) -> Any:
    """Apply `rule` to one score a group, and give every weight the verdict of its group."""
    layers, build = read_layers(scores)
    verdicts = jax.tree.leaves(rule(build([pooled(layer) for layer in layers]), k))
    return build([spread(mask, layer) for mask, layer in zip(verdicts, layers, strict=True)])
