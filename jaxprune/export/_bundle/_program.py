"""A function as a program in a file: exported, with what it takes and gives."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr._equations import everywhere
from jaxprune._tree._given import called_on
from jaxprune._tree._paths import Tree, flatten

# Primitives that call back into Python, which a program in a file has not.
_CALLBACKS = ("debug_callback", "debug_print", "io_callback", "pure_callback")
_CUSTOM_CALL = re.compile(r"custom_call @([\w.$]+)")
_FLATBUFFERS = "programs in files need the library flatbuffers: pip install 'jaxprune[export]'"


def dtype_of(leaf: Any) -> Any:
    """Return the dtype that a leaf has in a program: without 64 bits, unless JAX is told to have them."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.asarray(leaf).dtype
    return dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def is_known(leaf: Any) -> bool:
    """Whether JAX has a dtype, as it is set up now."""
    return bool(dtype_of(leaf) == leaf.dtype)


def in_words(leaf: Any) -> str:
    """Write what an array is: ``float32[batch, 16]``."""
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def specs(flat: Tree) -> list[jax.ShapeDtypeStruct]:
    """Return what the leaves of inputs are, with symbols for what strings stand for in their shapes; all of one scope."""
    shapes = [leaf.shape if hasattr(leaf, "shape") else np.shape(leaf) for leaf in flat.leaves]
    scopes = [dim.scope for shape in shapes for dim in shape if hasattr(dim, "scope")]
    scope = scopes[0] if scopes else jax.export.SymbolicScope()
    found = []
    for name, leaf, shape in zip(flat.names, flat.leaves, shapes, strict=True):
        try:
            dims = [jax.export.symbolic_shape(d, scope=scope)[0] if isinstance(d, str) else d for d in shape]
        except ValueError as error:
            raise ValueError(
                f"{name} has the shape {shape}, whose names of axes cannot be read: {first_line(error)} Name an axis by a "
                'word, as in jax.ShapeDtypeStruct(("batch", 16), jnp.float32).'
            ) from error
        found.append(jax.ShapeDtypeStruct(tuple(dims), dtype_of(leaf)))
    return found


@contextlib.contextmanager
def for_any_size(shaped: Any) -> Iterator[None]:
    """Raise a ValueError that says what to do where a function, as it is traced, needs the size of a symbolic axis."""
    sizes = sorted({str(n) for leaf in jax.tree.leaves(shaped) for n in leaf.shape if not isinstance(n, int)})
    try:
        yield
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"fn cannot be exported for every {' and '.join(sizes)}: {first_line(error)} Give an axis that it depends on a number."
        ) from error
    except TypeError as error:
        if "_DimExpr" not in str(error):
            raise
        raise ValueError(
            f"fn takes the size of an axis, {' or '.join(sizes)}, for an int, as len(x) and range(n) do. Write x.shape[0] for len(x), or "
            "give that axis a number."
        ) from error


def export(fn: Callable[..., Any], params: Tree, inputs: Sequence[Any], platforms: Sequence[str]) -> bytes:
    """Export ``fn(params, *inputs)`` as a function of the parameters by path, and of the inputs; return its bytes."""
    given = flatten(tuple(inputs), "inputs")
    shaped = given.build(specs(given))
    by_path = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf))
        for path, leaf in zip(params.paths, params.leaves, strict=True)
    }

    def program(leaves: dict[str, Any], *inputs: Any) -> Any:
        return fn(params.build([leaves[path] for path in params.paths]), *inputs)

    jitted = jax.jit(program)
    with for_any_size(shaped), called_on(fn, params.build(params.leaves), inputs):
        traced = jitted.trace(by_path, *shaped)
    for equation in everywhere(traced.jaxpr):
        if equation.name in _CALLBACKS:
            raise ValueError(
                f"fn calls back into Python by {equation.name} ({equation.place}), and a program in a file has no Python to call. "
                "Leave that out of the function that is saved."
            )
    try:
        exported = jax.export.export(jitted, platforms=list(platforms))(by_path, *shaped)
    except Exception as error:
        raise ValueError(_refused(error, platforms)) from error
    effects = (*exported.ordered_effects, *exported.unordered_effects)
    if effects:
        raise ValueError(
            f"fn has effects besides its results ({effects[0]}). Leave them out of the function that is saved."
        )
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise ModuleNotFoundError(_FLATBUFFERS, name="flatbuffers") from error
    except ValueError as error:
        raise ValueError(
            f"fn takes or gives what no program in a file does: {first_line(error)} Inputs and results may be arrays in "
            "dicts, lists and tuples; parameters may be any tree."
        ) from error


def _refused(error: Exception, platforms: Sequence[str]) -> str:
    calls = sorted(set(_CUSTOM_CALL.findall(str(error))))
    if calls:
        return (
            f"fn makes the custom call{'s' if len(calls) > 1 else ''} {', '.join(calls)}, and JAX does not promise that a later "
            "version of it, or another machine, has it. Write that in JAX's own operations."
        )
    return f"fn cannot be exported for {', '.join(platforms)}: {first_line(error)} Name other platforms=, or write it otherwise."


def read(blob: bytes) -> jax.export.Exported:
    """Read a program; what JAX raises where it cannot is passed on, whatever that is."""
    try:
        exported = jax.export.deserialize(bytearray(blob))
    except ImportError as error:
        raise ModuleNotFoundError(_FLATBUFFERS, name="flatbuffers") from error
    exported.mlir_module()  # the program proper, which would else be read when it is called first
    return exported


def params_of(program: jax.export.Exported) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what a program takes for parameters, by path."""
    return _arguments(program)[0]


def inputs_of(program: jax.export.Exported) -> tuple[Any, ...]:
    """Return the trees of what it takes besides."""
    return _arguments(program)[1:]


def _arguments(program: jax.export.Exported) -> tuple[Any, ...]:
    arguments, _ = jax.tree.unflatten(program.in_tree, map(_spec, program.in_avals))
    return tuple(arguments)


def outputs_of(program: jax.export.Exported) -> Any:
    """Return the tree of what it gives."""
    return jax.tree.unflatten(program.out_tree, map(_spec, program.out_avals))


def _spec(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
