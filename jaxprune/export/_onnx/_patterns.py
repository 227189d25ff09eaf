"""Operations that make up a function of ``jax.nn``, found again."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr._equations import evaluate
from jaxprune._jaxpr._primitives import COPIES, WINDOWED
from jaxprune.export._onnx._nodes import Node, Value, spread_constant

# What a pooling has for each axis.
_OF_WINDOWS = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


def relu(node: Node) -> Node | None:
    """Find ``max(x, 0)``."""
    x = _with_scalar(node, "max", 0.0)
    return None if x is None else _call(jax.nn.relu, x, node)


def gelu(node: Node) -> Node | None:
    """Find ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2`` and ``x erfc(-x / sqrt(2)) / 2``."""
    if node.name != "mul":
        return None
    for x, other in (node.operands, node.operands[::-1]):
        half = _with_scalar(other.node, "mul", 0.5)
        tanh = _operand(_with_scalar(_node(half), "add", 1.0), "tanh")
        cubic = _node(_with_scalar(_node(tanh), "mul", math.sqrt(2 / math.pi)))
        if cubic is not None and cubic.name == "add" and x in cubic.operands:
            (power,) = [value for value in cubic.operands if value is not x] or [x]
            cube = _node(_with_scalar(power.node, "mul", 0.044715))
            if cube is not None and cube.name == "integer_pow" and cube.params("y") == 3 and cube.operands[0] is x:
                return _call(functools.partial(jax.nn.gelu, approximate=True), x, node)
        halved = _with_scalar(x.node, "mul", 0.5)
        negative = _with_scalar(_node(_operand(other, "erfc")), "mul", math.sqrt(0.5))
        if halved is not None and _operand(negative, "neg") is halved:
            return _call(functools.partial(jax.nn.gelu, approximate=False), halved, node)
    return None


def softmax(node: Node) -> Node | None:
    """Find ``exp(x - max(x)) / sum(exp(x - max(x)))`` along the same axes, wherever those were moved to."""
    if node.name != "div":
        return None
    powers, divisor = node.operands
    difference = _node(_operand(powers, "exp"))
    if difference is None or difference.name != "sub":
        return None
    x, subtracted = difference.operands
    axes = _reduced(divisor, powers, "reduce_sum")
    if axes is None or axes != _reduced(subtracted, x, "reduce_max"):
        return None
    return _call(functools.partial(jax.nn.softmax, axis=axes), x, node)


def pooling(node: Node) -> Node | None:
    """Find poolings of more than two axes that are not pooled, as `jax.vmap` makes them, and make one axis of all but the last."""
    if node.name not in WINDOWED or node.equation is None:
        return None
    equation = node.equation
    settings = {name: equation.params[name] for name in _OF_WINDOWS}
    plain = {name: ((0, 0) if name == "padding" else 1) for name in _OF_WINDOWS}
    rank = len(node.operands[0].shape)
    pooled = [axis for axis in range(rank) if any(settings[name][axis] != plain[name] for name in _OF_WINDOWS)]
    others = [axis for axis in range(rank) if axis not in pooled]
    if len(others) <= 2:
        return None
    order = [*others, *pooled]
    back = [order.index(axis) for axis in range(rank)]
    merged = {name: (plain[name],) * 2 + tuple(values[axis] for axis in pooled) for name, values in settings.items()}

    def run(values: list[Any]) -> list[Any]:
        x = jnp.transpose(values[0], order)
        apart, rest = x.shape[: len(others) - 1], x.shape[len(others) - 1 :]
        (found,) = evaluate(equation.with_params(**merged), [x.reshape(math.prod(apart), *rest)])
        return [jnp.transpose(found.reshape(*apart, *found.shape[1:]), back)]

    return Node("pooling", node.operands, run, [value.shape for value in node.results])


def _call(function: Any, x: Value, node: Node) -> Node:
    name = getattr(function, "func", function).__name__
    return Node(name, [x], lambda values: [function(*values)], [value.shape for value in node.results])


def _node(value: Value | None) -> Node | None:
    return None if value is None else value.node


def _operand(value: Value | None, name: str) -> Value | None:
    """The operand of the step of this name that gives a value."""
    node = _node(value)
    return node.operands[0] if node is not None and node.name == name else None


def _with_scalar(node: Node | None, name: str, number: float) -> Value | None:
    """The other operand of a step of this name that has a number for one."""
    if node is None or node.name != name or len(node.operands) != 2:
        return None
    for operand, other in (node.operands, node.operands[::-1]):
        constant = spread_constant(other, max(len(other.shape), 1))
        whole = operand.shape == node.results[0].shape  # and not spread over the constant
        if constant is not None and whole and not operand.is_known and constant.size and _is(constant, number):
            return operand
    return None


def _is(constant: np.ndarray, number: float) -> bool:
    """Whether all of a constant is this number, as its dtype has it."""
    wide = np.asarray(constant, np.float64)
    if math.isinf(number) or number == 0:
        return bool((wide == number).all())
    return bool((np.abs(wide / number - 1) <= jnp.finfo(constant.dtype).eps).all())


def _reduced(value: Value, x: Value, name: str) -> tuple[int, ...] | None:
    """The axes of x along which a value is its reduction of this name, each number at the place that it was taken from.

    Both may be transposed on the way, and what was reduced broadcast again; None where the value is anything else.
    """
    rank = len(x.shape)
    places: list[int | None] = list(range(len(value.shape)))  # of the value's axes in what it is made of
    while value.node is not None and value.node.name != name:
        node = value.node
        bounded = _with_scalar(node, "max", -math.inf)
        value = node.operands[0] if bounded is None else bounded
        if bounded is None:
            back = _axes_before(node)
            if back is None:
                return None
            places = [None if place is None else back[place] for place in places]
    if value.node is None or len(places) != rank:
        return None
    whole, axes = value.node.operands[0], value.node.params("axes")
    order: list[int | None] = list(range(rank))  # of the axes of x in what was reduced
    while x is not whole:
        if x.node is None or x.node.name not in COPIES | {"transpose"}:
            return None
        back = _axes_before(x.node)
        assert back is not None
        order = [None if place is None else back[place] for place in order]
        x = x.node.operands[0]
    left = [axis for axis in range(len(whole.shape)) if axis not in axes]
    for place, axis in zip(places, order, strict=True):
        one = axis is None or whole.shape[axis] in (1,)
        if place is not None and (axis in axes or (not one and left[place] != axis)):
            return None
        if place is None and axis not in axes and not one:
            return None
    return tuple(at for at, axis in enumerate(order) if axis in axes)


def _axes_before(node: Node) -> list[int | None] | None:
    """For each axis of a result, that of the operand; None for one that is new or of length 1. None where values change."""
    before, after = node.operands[0].shape, node.results[0].shape
    ones = [isinstance(n, int) and n == 1 for n in after]
    if node.name in COPIES:
        found: list[int | None] = list(range(len(after)))
    elif node.name == "transpose":
        found = [int(axis) for axis in node.params("permutation")]
    elif node.name == "broadcast_in_dim":
        places = [int(axis) for axis in node.params("broadcast_dimensions")]
        found = [places.index(axis) if axis in places else None for axis in range(len(after))]
        found = [None if at is None or before[at] != after[axis] else at for axis, at in enumerate(found)]
    elif node.name in ("reshape", "squeeze"):  # by which axes of length 1 come and go
        long = [axis for axis, n in enumerate(before) if not (isinstance(n, int) and n == 1)]
        if [before[axis] for axis in long] != [n for n, one in zip(after, ones, strict=True) if not one]:
            return None
        rest = iter(long)
        found = [None if one else next(rest) for one in ones]
    else:
        return None
    return found
