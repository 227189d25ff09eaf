"""Which channels every layer of a scan can choose for itself, and what then stays, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxprune._jaxpr._primitives import GENERATED
from jaxprune.structured._axes._dims import Dim, Kept, Var, is_cut, kept_indices, leaves, resolve
from jaxprune.structured._axes._program import Program, Value
from jaxprune.structured._axes._replay import sums


def layers_of(program: Program) -> dict[Var, frozenset[Var]]:
    """Return for each axis those that scans step along, of whose layers each may keep elements of its own along it.

    Whatever has the former must be in a body of the scan or have the latter as well: what is carried, and what all layers
    read, does not. Nor may it be a constant or be made in the function (random bits): it would be cut alike in every layer.
    """
    found: dict[Var, frozenset[Var]] = {}
    for value, allowed in _values(program, frozenset()):
        for dim in value.dims:
            for var in leaves(dim):
                found[var] = found.get(var, allowed) & allowed
    return found


def _values(program: Program, inside: frozenset[Var]) -> Iterator[tuple[Value, frozenset[Var]]]:
    """Yield all values with the layers that each may belong to; `inside` are those whose scans are around the program."""
    for value in (*program.ins, *program.outs):
        yield value, inside | _stacked(value)
    for node in program.nodes:
        made, summed = node.name in GENERATED and not node.notes.renumbered, sums(node)
        for value in node.ins:
            yield value, frozenset() if value.const is not None else inside if summed else inside | _stacked(value)
        for value in node.outs:
            yield value, frozenset() if made else inside | _stacked(value)
        steps = node.notes.steps
        within = inside | {resolved} if steps is not None and isinstance(resolved := resolve(steps), Var) else inside
        for body in (*node.bodies, *([node.derivative] if node.derivative is not None else [])):
            yield from _values(body, within)


def _stacked(value: Value) -> frozenset[Var]:
    """The axes of layers that a value has as they are."""
    return frozenset(dim for dim in map(resolve, value.dims) if isinstance(dim, Var) and dim.depth)


def kept_of(dim: Dim, kept: Kept) -> np.ndarray:
    """Return the elements of an axis that stay, in rising order; ``[layers, n]`` where each layer keeps its own."""
    own = {var: kept[var] for var in leaves(dim) if var in kept}  # of other scans there may be fewer layers
    layers = {len(each) for each in own.values() if each.ndim == 2}
    if not layers:
        return kept_indices(dim, own)
    return np.stack([kept_indices(dim, _of_layer(own, number)) for number in range(layers.pop())])


def _of_layer(kept: Kept, number: int) -> dict[Var, np.ndarray]:
    """Return what one layer keeps."""
    return {var: each[number] if each.ndim == 2 else each for var, each in kept.items()}


def layers_axis(dims: Sequence[Dim], dim: Dim, layers: Mapping[Var, Var]) -> int:
    """Return the axis of the layers that each keep their own elements along another axis."""
    along = next(layers[var] for var in leaves(dim) if var in layers)
    return list(map(resolve, dims)).index(along)


def take_kept(array: np.ndarray, dims: Sequence[Dim], kept: Kept, layers: Mapping[Var, Var]) -> np.ndarray:
    """Return what stays of a whole array."""
    found = [kept_of(dim, kept) for dim in dims]
    for axis, (dim, indices) in enumerate(zip(dims, found, strict=True)):  # before layers go, whose indices are rows
        if indices.ndim == 2:
            rows = spread(indices, layers_axis(dims, dim, layers), axis, array.ndim)
            array = np.take_along_axis(array, rows, axis)
    for axis, (dim, indices) in enumerate(zip(dims, found, strict=True)):
        if indices.ndim == 1 and is_cut(dim, kept):
            array = np.take(array, indices, axis)
    return array


def spread(rows: np.ndarray, along: int, axis: int, ndim: int) -> np.ndarray:
    """Lay rows, one for each layer, along two axes of an array: the layers', and that of what is in the rows."""
    turned = rows.T if along > axis else rows
    return np.expand_dims(turned, [other for other in range(ndim) if other not in (along, axis)])
