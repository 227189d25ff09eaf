"""A function with its parameters as an ONNX file."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxprune._jaxpr import _equations
from jaxprune._tree._given import called_on
from jaxprune._tree._paths import flatten
from jaxprune.export._bundle import _program
from jaxprune.export._onnx._graph import drop_unused, move_pooled_axes_last, nodes_of
from jaxprune.export._onnx._simplify import simplified
from jaxprune.storage import _atomic

_MISSING = (
    "ONNX files are written with jax2onnx, which is not installed. It wants other versions of some packages than the examples "
    "do: give it an environment of its own, pip install jaxprune jax2onnx"
)
_MOST_BYTES = 2**31 - 2**24  # of weights: a protobuf holds less than 2 GiB


def save_onnx(
    path: str | os.PathLike[str], fn: Callable[..., Any], params: Any, *inputs: Any, force: bool = False
) -> Path:
    """Save a function and its parameters as ONNX, which onnxruntime and others run without JAX.

    The function is made simpler on the way. What depends on parameters alone is computed; what scales or shifts a product with a
    parameter, as a batch norm behind a convolution does, goes into that parameter; ReLU, GELU and softmax are found again in what
    `structured.rebuild` or JAX made of them; and poolings become such as onnxruntime runs. Results differ by rounding alone.

    Zeros make no runtime of ONNX faster, smaller arrays do: give it what `structured.shrink` and `structured.rebuild` return.

    Args:
        path: the file; one that is there already is replaced only by `force`.
        fn: ``(params, *inputs) -> results``, any that JAX traces and whose operations jax2onnx knows.
        params: a pytree of arrays, below 2 GiB; they become constants of the file.
        *inputs: examples of the inputs, as in `save`: a string in a shape is an axis of any size.
        force: whether to replace a file that is there already.

    Returns:
        The path. In the file inputs are named by their place, ``input_0``, and by their paths where they are trees,
        ``input_0_mask``; so are results, ``output`` or ``output_logits``.

    Raises:
        ValueError: jax2onnx does not know an operation, or the parameters are too large.
        FileExistsError: the file is there already, and `force` is False.
        ModuleNotFoundError: jax2onnx is missing.

    Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    2018, section 3.2 (batch norms folded into what stands before them).
    """
    path = Path(path)
    _atomic.require_file(path)
    _atomic.require_new(path, force)
    try:
        import jax2onnx
    except ImportError as error:
        raise ModuleNotFoundError(_MISSING, name="jax2onnx") from error
    flat, given = flatten(params, "params"), flatten(tuple(inputs), "inputs")
    flat.require_arrays()
    size = sum(leaf.nbytes for leaf in flat.leaves)
    if size > _MOST_BYTES:
        raise ValueError(
            f"params has {size:,} bytes, and an ONNX file holds less than 2 GiB. Save a bundle: export.save."
        )
    shapes = [jax.ShapeDtypeStruct(leaf.shape, _program.dtype_of(leaf)) for leaf in flat.leaves]
    specs = _program.specs(given)

    def of_leaves(params: list[Any], *leaves: Any) -> Any:
        return fn(flat.build(params), *given.build(list(leaves)))

    # Before jax2onnx puts functions of its own in the place of JAX's, which what fn jits would remember.
    with _program.for_any_size(specs), called_on(fn, params, inputs):
        body, shaped = _equations.trace(of_leaves, shapes, *specs)

    def converted(*leaves: Any) -> tuple[Any, ...]:
        return tuple(simplified(body, flat.leaves, leaves))

    try:
        model = jax2onnx.to_onnx(converted, specs, model_name="jaxprune")
    except Exception as error:  # it says in many ways that it does not know an operation
        raise ValueError(f"jax2onnx does not convert this function: {_program.first_line(error)}") from error
    move_pooled_axes_last(model.graph)
    drop_unused(model.graph)
    _name(
        model.graph,
        [f"input/{path}" for path in given.paths],
        [f"output/{path}" for path in flatten(shaped, "output").paths],
    )
    with _atomic.replacing(path) as file:
        file.write(model.SerializeToString())
    return path


def _name(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Name what a graph takes and gives by their paths."""
    from onnx import helper

    new: dict[str, str] = {}
    taken: set[str] = set()
    copies = []
    for infos, names in ((graph.input, inputs), (graph.output, outputs)):
        for info, name in zip(infos, names, strict=True):
            plain = re.sub(r"\W+", "_", name.rstrip("/"))
            while plain in taken:  # by another path that differs in signs alone
                plain += "_"
            taken.add(plain)
            if info.name in new:  # an input that is a result as well, or a result that is there twice
                copies.append(helper.make_node("Identity", [new[info.name]], [plain]))
            else:
                new[info.name] = plain
            info.name = plain
    for node in nodes_of(graph):
        for names in (node.input, node.output):
            names[:] = [new.get(name, name) for name in names]
    for tensor in graph.initializer:  # a result may be a constant
        tensor.name = new.get(tensor.name, tensor.name)
    graph.node.extend(copies)
