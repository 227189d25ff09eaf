"""Which axes of a leaf count layers, which number its inputs and which its outputs."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxprune._tree._leaves import is_function
from jaxprune._tree._names import KERNEL, WEIGHT, names, words
from jaxprune._tree._paths import Tree
from jaxprune._tree._patterns import as_patterns, fitting


class Axes(NamedTuple):
    """The roles of a leaf's axes, counted from its first axis on.

    Attributes:
        stack: the axes that count layers, rising.
        inputs: the axis along which neighbouring inputs of a unit lie: of a dense layer the contraction, of a convolution the
            input channels; None where they do not lie along one axis.
        outputs: the axes that number the output units, rising; None where that is not known.
        why: why `inputs` or `outputs` is None, the end of a sentence that begins with the leaf.
    """

    stack: tuple[int, ...]
    inputs: int | None
    outputs: tuple[int, ...] | None
    why: str = ""


@runtime_checkable
class Roles(Protocol):
    """What knows how a function uses its parameters: `jaxprune.sites.Sites`."""

    def prunable(self, path: str, leaf: Any) -> bool:
        """Whether the leaf multiplies data."""

    def axes(self, path: str) -> Axes | None:
        """The roles of the leaf's axes; None where the leaf multiplies no data."""


# A function of path and leaf to a number of leading axes, glob patterns (one axis), a tree (prefix) of numbers, or sites.
Stacked = Callable[[str, Any], int] | str | Sequence[str] | Any


def conventional(path: str, shape: tuple[int, ...], stack: tuple[int, ...] = ()) -> Axes:
    """Go by the conventions of frameworks: a leaf's name, its module's, how many axes it has, and how long they are.

    Flax, Haiku and Keras keep kernels as ``(..., in, out)``, attention projections as ``(in, heads, head_dim)``; PyTorch
    and Equinox call them ``weight`` and keep ``(out, in, ...)``. A matrix of another name is taken for ``x @ w``. What name
    and shape do not tell is left open: the kernels of transposed convolutions and einsums, three axes that may be the taps
    of a convolution, heads or layers.
    """
    own = [axis for axis in range(len(shape)) if axis not in stack]
    if len(own) < 2:
        return Axes(stack, None, tuple(own), f"has shape {shape}, which has no axis of inputs")
    *_, module, name = ["", "", *names(path)]
    of_one = tuple(shape[axis] for axis in own)
    layout = _weight_layout(module, of_one) if WEIGHT.fullmatch(name) else _kernel_layout(module, name, of_one)
    if isinstance(layout, str):
        return Axes(stack, None, None, f"of shape {shape} {layout}")
    inputs, outputs = layout
    return Axes(stack, own[inputs], tuple(own[axis] for axis in outputs))


# Which axis of one layer numbers the inputs, which ones the outputs.
_Layout = tuple[int, tuple[int, ...]]
_IN_OUT: _Layout = (-2, (-1,))
_OUT_IN: _Layout = (1, (0,))
# Modules of projections to heads and back, and of GPT-2 that give more or fewer features than they take.
_ATTENTION_INPUTS, _ATTENTION_OUTPUTS = ("query", "key", "value"), ("out", "attention_output")
_WIDENING, _NARROWING = ("c_attn", "c_fc"), ("c_proj", "q_attn")
# Words in the name of a convolution that makes its output larger.
_TRANSPOSED = re.compile("transposed?|deconvs?|upconv|tconv|convt|t|ups?|upscal(e|ing)|upsampler?|resize")

_OF_A_TRANSPOSED_CONVOLUTION = (
    "belongs to a transposed convolution, of which frameworks keep inputs and outputs in either order"
)
_OF_THREE_AXES = (
    "may be a convolution in one dimension, a projection to heads, or a stack of layers, which stacked= would name"
)


def _weight_layout(module: str, shape: tuple[int, ...]) -> _Layout | str:
    """Of a leaf that PyTorch or Equinox would call so; a sentence about the leaf where it cannot be told."""
    if module in (*_WIDENING, *_NARROWING) and len(shape) == 2:
        # GPT-2 as published keeps (in, out) under the names that its later writings use for (out, in).
        if shape[0] == shape[1]:
            return "may lie either way: GPT-2's own files keep (in, out), others of these names (out, in)"
        return _OUT_IN if (shape[0] > shape[1]) == (module in _WIDENING) else _IN_OUT
    if len(shape) > 2 and any(map(_TRANSPOSED.fullmatch, words(module))):
        return _OF_A_TRANSPOSED_CONVOLUTION
    if len(shape) == 3 and not _is_convolution(module) and shape[2] >= shape[0]:
        return _OF_THREE_AXES
    return _OUT_IN


def _kernel_layout(module: str, name: str, shape: tuple[int, ...]) -> _Layout | str:
    """Of a leaf of any other name."""
    said = {*words(module), *words(name)}
    if "einsum" in said:
        return "belongs to an einsum, whose equation alone says which axes are inputs"
    if len(shape) == 2:
        return _IN_OUT
    if any(map(_TRANSPOSED.fullmatch, said)):
        return (-1, (-2,)) if name == "w" else _OF_A_TRANSPOSED_CONVOLUTION  # Haiku has but one way
    if not KERNEL.fullmatch(name):
        return _layout_by_shape(shape)
    if len(shape) == 3:
        if module in _ATTENTION_INPUTS:
            return (0, (1, 2))
        return _IN_OUT if module in _ATTENTION_OUTPUTS or _is_convolution(module) else _OF_THREE_AXES
    if module in _ATTENTION_INPUTS or {"dense", "linear", "general"} & said:
        return "has more axes than a dense layer: heads, or a stack of layers, which stacked= would name"
    return _IN_OUT


def _layout_by_shape(shape: tuple[int, ...]) -> _Layout | str:
    """Of a convolution in two or more dimensions under a name of your own: no tap is longer than there are outputs."""
    if len(shape) == 3:
        return _OF_THREE_AXES
    first, last = max(shape[:-2]) <= shape[-1], max(shape[2:]) <= shape[0]
    if first == last:
        return "may be (..., in, out) or (out, in, ...); neither its name nor its shape tells"
    return _IN_OUT if first else _OUT_IN


def _is_convolution(module: str) -> bool:
    return any("conv" in word for word in words(module))


def read_axes(tree: Tree, stacked: Stacked = None, sites: Roles | None = None) -> list[Axes]:
    """Return for each leaf the roles of its axes; raise where `stacked` matches nothing."""
    known = [None if sites is None else sites.axes(path) for path in tree.paths]
    layers = _stacks(tree, stacked, known)
    return [
        conventional(path, np.shape(leaf), stack) if axes is None else axes._replace(stack=stack)
        for path, leaf, stack, axes in zip(tree.paths, tree.leaves, layers, known, strict=True)
    ]


def _stacks(tree: Tree, stacked: Any, known: list[Axes | None]) -> list[tuple[int, ...]]:
    if stacked is None:
        return [() if axes is None else axes.stack for axes in known]
    if isinstance(stacked, Roles):
        found = [stacked.axes(path) for path in tree.paths]
        return [() if axes is None else axes.stack for axes in found]
    patterns = as_patterns(stacked)
    if patterns is not None:
        counts = [int(named) for named in fitting(patterns, tree, "stacked")]
    elif is_function(stacked):
        counts = [int(stacked(path, leaf)) for path, leaf in zip(tree.paths, tree.leaves, strict=True)]
    else:
        counts = [0 if count is None else int(count) for count in tree.spread(stacked, "stacked")]
    asked = "the predicate" if is_function(stacked) else repr(stacked)
    for count, name, leaf in zip(counts, tree.names, tree.leaves, strict=True):
        if not 0 <= count <= np.ndim(leaf):
            raise ValueError(f"stacked={asked} gives {count} layer axes to {name} of shape {np.shape(leaf)}.")
    return [tuple(range(count)) for count in counts]
