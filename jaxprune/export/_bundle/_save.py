"""A function with its parameters, written to one file."""

import datetime
import json
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._tree._axes import Stacked
from jaxprune._tree._given import described
from jaxprune._tree._paths import flatten
from jaxprune.export._bundle import _program
from jaxprune.export._bundle._parts import PARAMS, PROGRAM, write_parts
from jaxprune.oneshot import Codes
from jaxprune.storage import Saved, _atomic, _writer
from jaxprune.storage._coding import read_coding
from jaxprune.storage._trees import encode_tree, inside_of, version
from jaxprune.structured._plan import Plan, require_plan

_KNOWN = ("cpu", "cuda", "rocm", "tpu")


def save(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    masks: Any = None,
    codes: Mapping[str, Codes] | None = None,
    quantize: int | None = None,
    quantize_tables: int | None = None,
    group_size: int | None = None,
    stacked: Stacked = None,
    dtype: str | None = None,
    plan: Plan | None = None,
    metrics: Mapping[str, float] | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    force: bool = False,
) -> Saved:
    """Save a function and its parameters in one file, a bundle, that `load` opens again without the code of either.

    The file is a zip of three parts, stored as they are: the program (StableHLO, by ``jax.export``), the parameters (safetensors,
    as `save_sparse` writes them), and a JSON that says what is in it, with a checksum of each. It appears whole or not at all. The
    parameters are arguments of the program, never constants in it; they are named by their paths, so that the program knows
    nothing of the classes that held them.

    JAX promises that later versions read a program for six months; save it anew before.

    Args:
        path: the file; one that is there already is replaced only by `force`.
        fn: ``(params, *inputs) -> results``, any that JAX traces. What it depends on besides its arguments is fixed now. Its inputs
            and results are arrays in dicts, lists and tuples. It has no effects, calls no Python, and makes no custom call but those
            that JAX keeps.
        params: a pytree of arrays, of any classes; dtypes as in `save_sparse`.
        *inputs: examples of the inputs, arrays or ``jax.ShapeDtypeStruct``. A string in a shape is an axis of any size, the same
            where it is the same: ``jax.ShapeDtypeStruct(("batch", 16), jnp.float32)``. Dimensions of ``jax.export.symbolic_shape`` will do.
        masks: as in `save_sparse`: the kept weights alone are stored.
        codes: as in `save_sparse`; what is quantised loads as the values that its integers stand for.
        quantize: as in `save_sparse`.
        quantize_tables: as in `save_sparse`.
        group_size: as in `save_sparse`.
        stacked: as in `save_sparse`.
        dtype: as in `save_sparse`, in the file alone: what was rounded loads in the dtype that the program takes.
        plan: what was cut from the parameters, to be kept with them.
        metrics: numbers by name that were measured with them, ``{"accuracy": 0.98}``.
        platforms: where the program can run: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
        force: whether to replace a file that is there already.

    Returns:
        A `storage.Saved`: the bytes of the file, and a row for each parameter.

    Raises:
        ValueError: fn has effects, calls Python, makes a custom call that JAX does not keep, takes or gives other containers, or
            needs the size of a symbolic axis; platforms are none; parameters cannot be stored, see `save_sparse`; the path
            of one lies inside another; `path` is no file.
        TypeError: fn is none, or does not take the inputs; metrics are no numbers; plan is none.
        FileExistsError: the file is there already, and `force` is False.
        ModuleNotFoundError: the library flatbuffers is missing.

    >>> import jax.numpy as jnp, tempfile
    >>> from jaxprune import export
    >>> params = {"w": jnp.array([[1.0], [2.0]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     x = jax.ShapeDtypeStruct(("batch", 2), jnp.float32)
    ...     _ = export.save(folder + "/model.jaxprune", lambda params, x: x @ params["w"], params, x, metrics={"accuracy": 0.98})
    ...     bundle = export.load(folder + "/model.jaxprune")
    >>> bundle(jnp.ones((3, 2))).ravel().tolist(), bundle.metrics
    ([3.0, 3.0, 3.0], {'accuracy': 0.98})
    """
    coding = read_coding(quantize, quantize_tables, group_size, dtype, compress=False)
    measured = _measured(metrics)
    if plan is not None:
        require_plan(plan, "save(..., plan=plan)")
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(_KNOWN):
        raise ValueError(f"platforms is a list of some of {', '.join(_KNOWN)}; got {platforms!r}.")
    _atomic.require_file(Path(path))
    _atomic.require_new(Path(path), force)
    flat = flatten(params, "params")
    flat.require_arrays()
    clash = inside_of(flat.paths)
    if clash is not None:
        raise ValueError(f"the path {clash[0]!r} of a parameter lies inside another, {clash[1]!r}; rename one of them.")
    chunks, header, rows = encode_tree(params, masks, codes=codes, stacked=stacked, coding=coding)
    blob = _program.export(fn, flat, inputs, platforms)
    program = _program.read(blob)
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"jax": jax.__version__, "jaxprune": version()},
        "platforms": list(program.platforms),
        "inputs": _listed(_program.inputs_of(program), "inputs"),
        "outputs": _listed(_program.outputs_of(program), "outputs"),
        "metrics": measured,
        "plan": None if plan is None else json.loads(plan.to_json()),
    }
    with _atomic.replacing(Path(path)) as file:
        write_parts(
            file,
            about,
            {
                PROGRAM: lambda stream: stream.write(blob),
                PARAMS: lambda stream: _writer.write_through(stream, chunks, header),
            },
        )
        size = file.seek(0, os.SEEK_END)
    return Saved(Path(path), size, sum(row.dense_bytes for row in rows), tuple(rows))


def _measured(metrics: Mapping[str, float] | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        number = np.asarray(value) if isinstance(value, numbers.Real) or hasattr(value, "dtype") else None
        if not isinstance(name, str) or number is None or number.shape or not np.isfinite(number):
            raise TypeError(f"metrics are finite numbers by name, but {name!r} is {described(value)}.")
        found[name] = number.item()
    return found


def _listed(tree: Any, what: str) -> list[dict[str, Any]]:
    flat = flatten(tree, what)
    return [
        {"name": name, "dtype": str(leaf.dtype), "shape": [n if isinstance(n, int) else str(n) for n in leaf.shape]}
        for name, leaf in flat.named()
    ]
