"""Which axes of a leaf count layers, which number its inputs and which its outputs."""

from typing import NamedTuple

_ATTENTION_INPUTS = ("query", "key", "value")


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


def conventional(path: str, shape: tuple[int, ...], stack: tuple[int, ...] = ()) -> Axes:
    """Go by the conventions of frameworks: a leaf's name, its module's, and how many axes it has.

    Flax and Haiku keep kernels as ``(..., in, out)``, attention projections as ``(in, heads, head_dim)``; Equinox, as
    PyTorch, calls them ``weight`` and keeps ``(out, in, ...)``.
    """
    own = [axis for axis in range(len(shape)) if axis not in stack]
    if len(own) < 2:
        return Axes(stack, None, tuple(own), f"has shape {shape}, which has no axis of inputs")
    *_, module, name = ["", *path.split("/")]
    if name.startswith("weight"):
        return Axes(stack, own[1], (own[0],))
    if module in _ATTENTION_INPUTS and len(own) == 3:
        return Axes(stack, own[0], (own[1], own[2]))
    return Axes(stack, own[-2], (own[-1],))
