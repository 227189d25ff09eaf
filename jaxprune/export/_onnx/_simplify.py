"""A function of known parameters in fewer and larger steps: constants computed, scales folded, known functions by name.

A program of single operations hides from another runtime what it knows how to run fast. Here the equations of a function become
nodes. What depends on parameters alone is computed now; what scales or shifts a product with a parameter, as a batch norm behind
a convolution does, goes into that parameter; and the operations that make up a ReLU, a GELU or a softmax become calls of them.
"""

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._equations import Body, Equation
from jaxprune.export._onnx import _patterns
from jaxprune.export._onnx._nodes import Node, Value, known, spread_constant

# A constant is computed where that makes it no more than so many times as large as what it is made of, or not large.
_GROWTH, _SMALL = 4, 2**16
_EXACT = frozenset({"copy", "copy_p", "stop_gradient", "name", "optimization_barrier", "convert_element_type"})


def simplified(body: Body, parameters: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Evaluate a function in fewer steps; return its results.

    Args:
        body: the function; its first arguments are the parameters.
        parameters: arrays whose values are known.
        inputs: its other arguments; they may be traced.
    """
    nodes: list[Node] = []
    given = [Value(tuple(x.shape), array=x) for x in inputs]
    results = _expand(body, [*map(known, parameters), *given], nodes)
    uses = collections.Counter(id(value) for node in nodes for value in node.operands)
    uses.update(map(id, results))
    now: dict[int, Value] = {}
    for node in nodes:
        before, node.operands = node.operands, [now.get(id(value), value) for value in node.operands]
        alone = [uses[id(value)] == 1 for value in before]
        now.update(zip(map(id, node.results), _rewritten(node, alone), strict=True))
    return _evaluate([now.get(id(value), value) for value in results])


def _expand(body: Body, arguments: Sequence[Value], nodes: list[Node]) -> list[Value]:
    """Add a node for each equation, also of the functions that are called; return the results."""

    def step(_: int, equation: Equation, operands: list[Value]) -> list[Value]:
        inner = _equations.call(equation)
        if inner is not None:
            return _expand(inner, operands, nodes)
        run = functools.partial(_run, equation)
        nodes.append(Node(equation.name, operands, run, equation.out_shapes, equation))
        return nodes[-1].results

    return _equations.interpret(body, arguments, known, step)


def _rewritten(node: Node, alone: Sequence[bool]) -> Sequence[Value]:
    """Return what stands for a node's results: constants, results of a larger step, or its own.

    Args:
        node: with operands that are rewritten already.
        alone: of each operand, whether nothing else uses it.
    """
    if node.name in _EXACT and len(node.operands) == 1 and node.keeps_dtype:
        return node.operands
    if all(value.is_known for value in node.operands):
        return _computed(node) or node.results
    for rewrite in (_patterns.relu, _patterns.gelu, _patterns.softmax, _patterns.pooling):
        found = rewrite(node)
        if found is not None:
            return found.results
    found = _folded(node, alone)
    return node.results if found is None else found.results


def _computed(node: Node) -> list[Value] | None:
    """Compute a node of constants; None where that cannot be, or would fill the file."""
    if not all(isinstance(n, int) for value in node.results for n in value.shape):
        return None
    before, after = (sum(math.prod(value.shape) for value in values) for values in (node.operands, node.results))
    if after > max(_SMALL, _GROWTH * before):
        return None
    try:
        with jax.ensure_compile_time_eval():
            return [known(array) for array in node.run([value.constant for value in node.operands])]
    except Exception:  # what another library has put in place of a primitive may have no value
        return None


def _folded(node: Node, alone: Sequence[bool]) -> Node | None:
    """Put a scale or a shift into the product before it, where that is used nowhere else."""
    if node.name not in ("add", "add_any", "sub", "mul", "div") or len(node.operands) != 2:
        return None
    for at, other in ((0, 1), (1, 0)):
        product, constant = node.operands[at].node, spread_constant(node.operands[other], len(node.results[0].shape))
        if product is None or constant is None or not alone[at] or node.results[0].shape != node.operands[at].shape:
            continue
        axes = _axes(product)
        if axes is None or any(n != 1 and axis not in axes[1] for axis, n in enumerate(constant.shape)):
            continue
        if node.name == "div" and at == 1:
            continue
        scale: Any = 1.0
        shift = np.zeros((), constant.dtype)
        if node.name in ("mul", "div"):
            with np.errstate(divide="ignore"):
                scale = constant if node.name == "mul" else 1 / constant
        else:
            shift = -constant if node.name == "sub" and at == 0 else constant
            scale = constant.dtype.type(-1 if node.name == "sub" and at == 1 else 1)
        if not np.isfinite(scale).all():  # infinity times a weight of zero is not what the sum times infinity is
            return None
        return _scaled(product, *axes, scale, shift)
    return None


def _axes(node: Node) -> tuple[int, dict[int, int]] | None:
    """Of a product with a constant: which operand that is, and by the axes of the result those of it; else None."""
    if node.equation is None or node.name not in ("conv_general_dilated", "dot_general"):
        return None
    params, which = node.equation.params, [value.is_known for value in node.operands]
    if sum(which) != 1 or not np.issubdtype(np.asarray(node.operands[which.index(True)].constant).dtype, np.floating):
        return None
    at = which.index(True)
    if node.equation.in_dtypes[at] != node.equation.out_dtypes[0]:
        return None  # the kernel would round what was computed in more bits
    if node.name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        fits = at == 1 and params["batch_group_count"] == 1
        return (at, {numbers.out_spec[1]: numbers.rhs_spec[0]}) if fits else None
    (contracted, batch), ranks = params["dimension_numbers"], [len(value.shape) for value in node.operands]
    free = [[axis for axis in range(ranks[i]) if axis not in (*contracted[i], *batch[i])] for i in (0, 1)]
    first = len(batch[0]) + (len(free[0]) if at == 1 else 0)
    found = dict(enumerate(batch[at])) | dict(enumerate(free[at], first))
    return at, found


def _scaled(product: Node, at: int, axes: dict[int, int], scale: Any, shift: np.ndarray) -> Node:
    """Return a product whose results are scaled, then shifted."""
    assert product.equation is not None
    kernel = np.asarray(product.operands[at].constant)
    by_kernel = np.ones((1,) * kernel.ndim, kernel.dtype)
    if np.ndim(scale):
        shape = [1] * kernel.ndim
        for axis, of_kernel in axes.items():
            shape[of_kernel] = scale.shape[axis]
        order = sorted(axes, key=axes.__getitem__)
        moved = np.transpose(scale, [*order, *(axis for axis in range(scale.ndim) if axis not in axes)])
        by_kernel = moved.reshape(shape)
    else:
        by_kernel = by_kernel * scale
    operands = list(product.operands)
    operands[at] = known((kernel * by_kernel).astype(kernel.dtype))
    before = np.zeros((), kernel.dtype) if product.shift is None else product.shift
    total = (before * scale + shift).astype(kernel.dtype)
    equation = product.equation

    def run(values: list[Any]) -> list[Any]:
        return [_run(equation, values)[0] + total]

    shapes = [value.shape for value in product.results]
    return Node(product.name, operands, run, shapes, equation, shift=total)


def _run(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation; a product of rows with a kernel as a product of matrices, which runtimes and quantisers know."""
    if equation.name != "dot_general" or equation.in_dtypes != equation.out_dtypes * 2:
        return _equations.evaluate(equation, values)
    (left, right), batch = equation.params["dimension_numbers"]
    x, kernel = values
    first = x.ndim - len(left)
    if any(batch) or list(left) != list(range(first, x.ndim)) or list(right) != list(range(len(right))):
        return _equations.evaluate(equation, values)
    inputs, outputs = math.prod(kernel.shape[: len(right)]), kernel.shape[len(right) :]
    found = jnp.matmul(x.reshape(*x.shape[:first], inputs), kernel.reshape(inputs, math.prod(outputs)))
    return [found.reshape(*x.shape[:first], *outputs)]


def _evaluate(results: Sequence[Value]) -> list[Any]:
    """Compute what the results need, in order."""
    waiting = [value.node for value in results if value.node is not None]
    order: dict[int, Node] = {}
    while waiting:
        node = waiting[-1]
        missing = [value.node for value in node.operands if value.node is not None and id(value.node) not in order]
        if missing:
            waiting += missing
        else:
            order[id(waiting.pop())] = node
    for node in order.values():
        if node.results[0].array is None:
            arrays = node.run([value.read() for value in node.operands])
            for value, array in zip(node.results, arrays, strict=True):
                value.array = array
    return [value.read() for value in results]
