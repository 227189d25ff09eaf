"""The arrays of a quantised parameter, as in qwix's QArray: integers in its place, scales and codes of zero that many share."""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxprune.structured._indices import as_tuples, is_nested
from jaxprune.structured._plan import Plan


def parts_of(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return by its path the parameter that an array is a part of, and which part: ``qvalue``, ``scale``, ``zero_point``.

    >>> parts_of(["a/kernel/array/qvalue", "a/kernel/array/scale", "norm/scale"])
    {'a/kernel/array/qvalue': ('a/kernel', 'qvalue'), 'a/kernel/array/scale': ('a/kernel', 'scale')}
    """
    known = set(paths)
    found = {}
    for path in sorted(known):
        whole, _, part = path.rpartition("/")
        if part in ("qvalue", "scale", "zero_point") and {f"{whole}/qvalue", f"{whole}/scale"} <= known:
            found[path] = whole.removesuffix("/array"), part
    return found


def of_shared(plan: Plan, path: str, shape: Sequence[int], name: str) -> Plan:
    """Return what a plan cuts of the scales of a parameter, where neighbours share one.

    Args:
        plan: what stays of the parameter.
        path: of the parameter.
        shape: of the scales: along each axis one for all, one for each, or one for each of some groups of one length.
        name: of the scales, for messages.

    Raises:
        ValueError: the scales are of no such shape, or of some group a part stays.
    """
    whole, kept = plan.shapes[path], dict(plan.kept[path])
    if len(shape) != len(whole) or any(n % groups for n, groups in zip(whole, shape, strict=True)):
        raise ValueError(f"{name}, of shape {tuple(shape)}, does not hold the scales of {path}, of shape {whole}.")
    for axis, indices in plan.kept[path].items():
        length = whole[axis] // shape[axis]
        if shape[axis] == 1:
            del kept[axis]
        elif length > 1:
            rows = np.asarray(indices) // length
            groups = rows[..., ::length]
            if rows.shape[-1] % length or (np.repeat(groups, length, axis=-1) != rows).any():
                raise ValueError(
                    f"{name} has a scale for each {length} neighbours along axis {axis} of {path}, and the plan keeps a part of "
                    "some. Cut the parameter before it is quantised: dequantise it, shrink, and quantise again."
                )
            kept[axis] = as_tuples(groups)
    layers = {path: plan.layers[path]} if any(map(is_nested, kept.values())) else {}
    return Plan({path: kept}, {path: tuple(shape)}, layers=layers)
