"""Which axes of a kernel are its inputs and which its outputs, by the conventions of each framework."""

from jaxprune.rules._layers import Layer

_ATTENTION_INPUTS = ("query", "key", "value")


def input_axis(layer: Layer) -> int:
    """The axis along which a unit's inputs lie: the contraction of a dense layer, the input channels of a convolution.

    Flax and Haiku keep kernels as ``(..., in, out)``, attention projections as ``(in, heads, head_dim)``; Equinox, as
    PyTorch, calls them ``weight`` and keeps ``(out, in, ...)``.
    """
    if _out_first(layer):
        return layer.stack + 1
    return layer.stack if _projects_to_heads(layer) else layer.values.ndim - 2


def output_axes(layer: Layer) -> tuple[int, ...]:
    """The axes that number a layer's output units; all others are inputs of one unit."""
    if _out_first(layer):
        return (layer.stack,)
    ndim = layer.values.ndim
    return (ndim - 2, ndim - 1) if _projects_to_heads(layer) else (ndim - 1,)


def _out_first(layer: Layer) -> bool:
    return layer.path.rpartition("/")[2].startswith("weight")


def _projects_to_heads(layer: Layer) -> bool:
    *_, module, _ = ["", "", *layer.path.split("/")]
    return module in _ATTENTION_INPUTS and len(layer.axes) == 3


def resolve_axis(axis: int, layer: Layer, rule: str) -> int:
    """Turn an axis of one layer into an axis of the leaf, behind its stack; raise when there is none."""
    ndim = len(layer.axes)
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{rule} was given axis {axis}, but {layer.name} has shape {layer.values.shape[layer.stack :]}. "
            "Choose another axis, or leave this parameter dense with prunable=..."
        )
    return layer.stack + axis % ndim
