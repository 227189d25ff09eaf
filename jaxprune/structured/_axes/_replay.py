"""Evaluate a labelled program again: on arrays from which elements were cut, or on whole arrays under masks."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._primitives import CONTRACTIONS, CUSTOM, GENERATED, REMAT
from jaxprune._jaxpr._records import Convolution, Dot, RaggedDot, Remat, StaticSlice, axes, edges, resized, window_sizes
from jaxprune.structured._axes._dims import (
    Cat,
    Dim,
    Kept,
    Prod,
    Var,
    is_cut,
    kept_indices,
    kept_size,
    leaves,
    resolve,
    size,
)
from jaxprune.structured._axes._label import differentiable, is_floating
from jaxprune.structured._axes._program import Node, Program, Value

# For some variables, which elements stay, in a row for each layer where layers have their own; and for some sums, whether
# the branch does (`find_branches`). Arrays of bool, which may be traced.
Masks = dict[Var | Node, Any]


@dataclasses.dataclass(eq=False)
class Replay:
    """One evaluation.

    Attributes:
        kept: the elements that stay of each variable that is cut.
        sizes: of the variables whose size is not the traced one: what is cut, and the batch.
        rescaled: whether a mean divides by the number of elements that stay, not by how many there were.
        layers: for variables of which each layer of a scan may keep its own elements, the axis of the layers.
    """

    kept: Kept = dataclasses.field(default_factory=dict)
    sizes: dict[Var, Any] = dataclasses.field(default_factory=dict)
    rescaled: bool = False
    layers: Mapping[Var, Var] = dataclasses.field(default_factory=dict)

    def bind(self, dims: Sequence[Dim], shape: Sequence[Any]) -> None:
        """Take note of sizes that are others than when the function was traced; they may be symbolic."""
        for dim, length in zip(dims, shape, strict=True):
            if length == kept_size(dim, self.sizes):
                continue
            outer, *inner = leaves(dim)
            self.sizes[outer] = length // math.prod(kept_size(factor, self.sizes) for factor in inner)

    def run(self, program: Program, arguments: Sequence[Any], masks: Masks) -> list[Any]:
        """Evaluate a program.

        Args:
            program: the program.
            arguments: its arguments.
            masks: of variables of which nothing is cut; empty for evaluation without masks.

        Returns:
            Its results.
        """
        values = dict(zip(map(id, program.ins), arguments, strict=True))

        def read(value: Value) -> Any:
            found = values.get(id(value))
            return self._constant(value) if found is None else found

        for node in program.nodes:
            results = self._node(node, [read(value) for value in node.ins], masks)
            values.update((id(value), result) for value, result in zip(node.outs, results, strict=True))
        return [read(value) for value in program.outs]

    def _constant(self, value: Value) -> Any:
        """Cut a constant; only of those is it known what stays."""
        assert value.const is not None, "a value is read before it is known"
        return self._cut(value.const, value.dims)

    def _cut(self, array: Any, dims: Sequence[Dim], first: int = 0) -> Any:
        for axis, dim in enumerate(dims, first):
            if is_cut(dim, self.kept):
                array = jnp.take(array, jnp.asarray(kept_indices(dim, self.kept)), axis=axis)
        return array

    def _size(self, dim: Dim) -> Any:
        return kept_size(dim, self.sizes)

    def _node(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        if node.name in CUSTOM:
            return self._custom(node, values, masks)
        if node.name in REMAT:
            return self._remat(node, values, masks)
        if (scan := _equations.scan(node.equation)) is not None:
            return self._scan(node, scan, values, masks)
        if (loop := _equations.while_loop(node.equation)) is not None:
            return self._while(node, loop, values, masks)
        if node.name == "cond":
            index, *operands = values
            branches = [lambda *v, b=body: self.run(b, v, masks) for body in node.bodies]
            return list(jax.lax.switch(index, branches, *operands))
        if masks:
            values = _masked(node, values, masks)
        if node.notes.count is not None:
            return [jax.lax.div(values[0], jnp.asarray(self._count(node.notes.count), values[0].dtype))]
        if node.name in GENERATED:
            return [self._generate(node, values)]
        sizes = _SIZES.get(node.name)
        equation = node.equation
        if sizes is not None and self.sizes:
            equation = resized(equation, *sizes(node, self._size))
        results = _equations.evaluate(equation, values)
        if node in masks:
            assert node.notes.stream is not None
            return [jnp.where(masks[node], results[0], values[node.notes.stream])]
        if node.notes.opaque:
            for value, result in zip(node.outs, results, strict=True):
                if result is not None:
                    self.bind(value.dims, result.shape)
        return results

    def _count(self, summed: Sequence[Dim]) -> Any:
        """How many elements a mean is over; what was cut counts as before unless means are rescaled."""
        sizes = self.sizes if self.rescaled else {v: n for v, n in self.sizes.items() if v not in self.kept}
        return math.prod(kept_size(dim, sizes) for dim in summed)

    def _generate(self, node: Node, values: list[Any]) -> Any:
        """Make whole what belongs to places, then cut it; random keys are cut before."""
        (out,) = node.outs
        if node.notes.renumbered:
            return _equations.evaluate(resized(node.equation, tuple(map(self._size, out.dims))), values)[0]
        keys = len(node.ins[0].shape) if node.ins else 0
        uncut = {var: n for var, n in self.sizes.items() if var not in self.kept}
        shape = tuple(kept_size(dim, uncut) for dim in out.dims[keys:])
        (result,) = _equations.evaluate(resized(node.equation, shape), values)
        return self._cut(result, out.dims[keys:], keys)

    # ---- what has programs inside

    def _scan(self, node: Node, scan: _equations.Scan, values: list[Any], masks: Masks) -> list[Any]:
        first, last = scan.consts, scan.consts + scan.carry
        consts, init, stacked = values[:first], values[first:last], values[last:]
        assert node.notes.steps is not None
        steps = resolve(node.notes.steps)
        own: list[Var | Node] = [v for v in masks if isinstance(v, Var) and self.layers.get(v) is steps]

        def step(carry: Sequence[Any], xs: tuple[Sequence[Any], Any, list[Any]]) -> tuple[list[Any], list[Any]]:
            slices, stays, rows = xs
            inside: Masks = masks | dict(zip(own, rows, strict=True))
            results = self.run(node.bodies[0], [*consts, *carry, *slices], inside)
            moved, outs = results[: scan.carry], results[scan.carry :]
            if stays is not None:
                moved = [jnp.where(stays, new, old) for new, old in zip(moved, carry, strict=True)]
            return moved, outs

        xs = stacked, mask_of(steps, masks), [masks[var] for var in own]
        length = None if stacked else scan.length
        carry, outs = jax.lax.scan(step, init, xs, length, reverse=scan.reverse, unroll=scan.unroll)
        return [*carry, *outs]

    def _while(self, node: Node, loop: _equations.While, values: list[Any], masks: Masks) -> list[Any]:
        first, last = loop.cond_consts, loop.cond_consts + loop.body_consts
        condition, body = node.bodies
        return list(
            jax.lax.while_loop(
                lambda carry: self.run(condition, [*values[:first], *carry], masks)[0],
                lambda carry: self.run(body, [*values[first:last], *carry], masks),
                values[last:],
            )
        )

    def _remat(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        def body(values: list[Any], masks: list[Any]) -> list[Any]:
            return self.run(node.bodies[0], values, dict(zip(variables, masks, strict=True)))

        variables = list(masks)
        run = jax.checkpoint(body, **Remat.of(node.equation)._asdict())
        return run(values, list(masks.values()))

    def _custom(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        """Evaluate a function that brings its own derivative, and bring that one along.

        Masks are arguments here: a derivative is taken when the trace they belong to may be over.
        """
        variables = list(masks)
        (program,), derivative = node.bodies, node.derivative
        wanted = differentiable(node)
        floating = [i for i, value in enumerate(node.ins) if is_floating(value)]

        def primal(masks: list[Any], *values: Any) -> list[Any]:
            return self.run(program, values, dict(zip(variables, masks, strict=True)))

        def derive(masks: list[Any], values: Sequence[Any], moves: Sequence[Any]) -> list[Any]:
            assert derivative is not None
            return self.run(derivative, [*values, *moves], dict(zip(variables, masks, strict=True)))

        def pushforward(primals: Any, tangents: Any) -> Any:
            masks, *values = primals
            results = primal(masks, *values)
            moved = iter(derive(masks, values, [tangents[1 + i] for i in floating]))
            return results, [next(moved) if i in wanted else _no_tangent(result) for i, result in enumerate(results)]

        def pullback(saved: Any, cotangents: Any) -> Any:
            masks, values = saved
            moved = iter(derive(masks, values, [cotangents[i] for i in wanted]))
            return None, *(next(moved) if i in floating else None for i in range(len(values)))

        if "vjp" in node.name:
            backward = jax.custom_vjp(primal)
            backward.defvjp(lambda masks, *values: (primal(masks, *values), (masks, values)), pullback)
            return backward(list(masks.values()), *values)
        forward = jax.custom_jvp(primal)
        forward.defjvp(pushforward)
        return forward(list(masks.values()), *values)


def _no_tangent(result: Any) -> Any:
    if jnp.issubdtype(result.dtype, jnp.inexact):
        return jnp.zeros_like(result)
    return np.zeros(result.shape, jax.dtypes.float0)


# ---- what `resized` takes, by kind of primitive


Length = Callable[[Dim], Any]


def _slice(node: Node, length: Length) -> tuple[Any, ...]:
    (out,), (start, _, stride) = node.outs, StaticSlice.of(node.equation)
    starts, limits = [], []
    for axis, (dim, before, step) in enumerate(zip(out.dims, node.notes.before, stride, strict=True)):
        starts.append(start[axis] if before is None else length(before))
        limits.append(starts[-1] + (length(dim) - 1) * step + 1 if out.shape[axis] else starts[-1])
    return tuple(starts), tuple(limits)


def _pad(node: Node, length: Length) -> tuple[Any, ...]:
    config = []
    for (before, after), (low, high, interior) in zip(node.notes.edges, edges(node.equation), strict=True):
        config.append((low if before is None else length(before), high if after is None else length(after), interior))
    return (tuple(config),)


def _gather(node: Node, length: Length) -> tuple[Any, ...]:
    widths = zip(node.notes.windows, window_sizes(node.equation), strict=True)
    return (tuple(width if dim is None else length(dim) for dim, width in widths),)


def _shape(node: Node, length: Length) -> tuple[Any, ...]:
    return (tuple(length(dim) for dim in node.outs[0].dims),)


def _split(node: Node, length: Length) -> tuple[Any, ...]:
    (along,) = axes(node.equation)
    return (tuple(length(value.dims[along]) for value in node.outs),)


_SIZES: dict[str, Callable[[Node, Length], tuple[Any, ...]]] = {
    "reshape": _shape,
    "broadcast_in_dim": _shape,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "tile": lambda node, length: (tuple(length(dim) for dim in node.notes.repeats),),
    "gather": _gather,
    "dynamic_slice": _gather,
    "conv_general_dilated": lambda node, length: (1 if node.notes.groups is None else length(node.notes.groups),),
}


# ---- masks


def mask_of(dim: Dim, masks: Masks) -> Any:
    """Return which elements of an axis stay, or None where all do."""
    dim = resolve(dim)
    if not is_cut(dim, masks):
        return None
    if isinstance(dim, Var):
        return masks[dim]
    inner = dim.factors if isinstance(dim, Prod) else dim.parts
    found = [mask_of(part, masks) for part in inner]
    filled = [jnp.ones(size(part), bool) if m is None else m for part, m in zip(inner, found, strict=True)]
    if isinstance(dim, Cat):
        return jnp.concatenate(filled)
    whole = filled[0]
    for factor in filled[1:]:
        whole = (whole[:, None] & factor[None]).reshape(-1)
    return whole


def sums(node: Node) -> bool:
    """Whether an equation sums over axes of its operands, or looks for the largest along them."""
    return node.name in CONTRACTIONS or node.name in _NEUTRAL


def _masked(node: Node, values: list[Any], masks: Masks) -> list[Any]:
    """Give what is pruned along the axes that an equation sums over the value that changes nothing."""
    summed: Sequence[Sequence[int]] = ()
    neutral = 0
    if node.name == "dot_general":
        summed = Dot.of(node.equation).contract
    elif node.name == "conv_general_dilated":
        conv = Convolution.of(node.equation)
        summed = (conv.image[1:2], conv.kernel[1:2])
    elif node.name == "ragged_dot_general":
        summed = (*RaggedDot.of(node.equation).contract, ())
    elif node.name in _NEUTRAL:
        summed, neutral = (axes(node.equation),), _NEUTRAL[node.name](node.ins[0].dtype)
    if not summed:
        return values
    operands = zip(values, node.ins, summed, strict=True)
    return [_fill(array, value, along, masks, neutral) for array, value, along in operands]


def _lowest(dtype: Any) -> Any:
    if dtype == np.bool_:
        return False
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    if dtype == np.bool_:
        return True
    return jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


_NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "reduce_sum": lambda dtype: 0,
    "reduce_prod": lambda dtype: 1,
    "reduce_max": _lowest,
    "reduce_min": _highest,
    "psum": lambda dtype: 0,
    "pmax": _lowest,
    "pmin": _highest,
    "reduce_and": lambda dtype: True,
    "reduce_or": lambda dtype: False,
    "reduce_xor": lambda dtype: False,
    "top_k": _lowest,
    "argmax": _lowest,
    "argmin": _highest,
}


def _fill(array: Any, value: Value, summed: Sequence[int], masks: Masks, neutral: Any) -> Any:
    for axis in summed:
        mask = mask_of(value.dims[axis], masks)
        if mask is not None:
            shape = [1] * len(value.shape)
            shape[axis] = value.shape[axis]
            array = jnp.where(mask.reshape(shape), array, jnp.asarray(neutral, array.dtype))
    return array
