"""A function with its parameters, read from one file."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxprune._printing import Printable, many
from jaxprune._tree._leaves import is_known
from jaxprune._tree._paths import Tree, as_prefix, flatten
from jaxprune.export._bundle import _program
from jaxprune.export._bundle._parts import PARAMS, PROGRAM, Parts
from jaxprune.storage._container import TensorFile
from jaxprune.storage._tensors import tensors
from jaxprune.structured._plan import Plan

if TYPE_CHECKING:
    from jaxprune._tables import Table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bundle(Printable):
    """What `load` opened: a function with its parameters, called as ``bundle(*inputs)``.

    Attributes:
        path: the file.
        fn: ``(params, *inputs) -> results``, compiled when it is called; `params` may be others of the same paths, shapes and
            dtypes, in a tree of any classes. It has no derivative and cannot be vmapped.
        params: the parameters, in nested dicts by the parts of their paths.
        inputs: what the function takes besides, a tuple of trees of ``jax.ShapeDtypeStruct``; a symbol in a shape is any size.
        outputs: what it gives.
        platforms: where it can run.
        plan: what was cut from the parameters, or None.
        metrics: what was measured, by name.
        versions: of jax and jaxprune, by which it was written.
        date: when that was, UTC, by ISO 8601.
    """

    path: Path
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    outputs: Any
    platforms: tuple[str, ...]
    plan: Plan | None
    metrics: dict[str, float]
    versions: dict[str, str]
    date: str

    def __call__(self, *inputs: Any) -> Any:
        """Return the function's results on its own parameters."""
        return self.fn(self.params, *inputs)

    def _in_short(self) -> str:
        return f"{self.path}, {many(len(self.inputs), 'input')}, for {', '.join(self.platforms)}"

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed: what it takes and gives, and what is known of it."""
        from jaxprune._tables import Table

        table = Table(full=full, title=str(self.path), title_justify="left")
        table.add_column("", overflow="fold")
        table.add_column("is", overflow="fold")
        for tree, what in ((self.inputs, "inputs"), (self.outputs, "outputs")):
            for name, leaf in flatten(tree, what).named():
                table.add_row(name, _program.in_words(leaf))
        leaves = jax.tree.leaves(self.params)
        table.add_row("params", f"{sum(leaf.size for leaf in leaves):,} in {many(len(leaves), 'array')}")
        table.add_row("platforms", ", ".join(self.platforms))
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.4g}")
        table.add_row("written", f"{self.date}, by {', '.join(' '.join(item) for item in self.versions.items())}")
        return table


def load(path: str | os.PathLike[str]) -> Bundle:
    """Open what `save` saved: no code of the model is needed, nor any of its classes.

    A bundle is a program: open only those of people whom you trust. Nothing of it runs before it is called, and then nothing but
    StableHLO; there is no pickle in it, and no Python.

    Args:
        path: the file.

    Returns:
        A `Bundle`.

    Raises:
        StorageError: the file is damaged, no bundle, of a newer version of the format, or of a time whose programs the installed
            jax reads no more, or not yet; a subclass of ValueError.
        ValueError: the program takes numbers of 64 bits, which JAX does not have unless it is told. Later, where it is called:
            inputs or parameters are not those that it takes, or it was not exported for this platform.
        ModuleNotFoundError: the library flatbuffers is missing.

    >>> import jax.numpy as jnp, tempfile
    >>> from jaxprune import export
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export.save(folder + "/model.jaxprune", lambda params, x: x * params, jnp.float32(3.0), jnp.ones(2))
    ...     bundle = export.load(folder + "/model.jaxprune")
    >>> bundle(jnp.arange(2.0)).tolist(), bundle.fn(jnp.float32(5.0), jnp.arange(2.0)).tolist()
    ([0.0, 3.0], [0.0, 5.0])
    """
    with open(path, "rb") as file:
        parts = Parts(Path(path), file)
        program = _read_program(parts)
        wanted = _program.params_of(program)
        wide = [
            leaf.dtype for leaf in jax.tree.leaves((wanted, _program.inputs_of(program))) if not _program.is_known(leaf)
        ]
        if wide:
            raise ValueError(f"{path} computes with {wide[0]}: call jax.config.update('jax_enable_x64', True) before.")
        params = _read_params(parts, wanted)
    return Bundle(
        path=parts.path,
        fn=_function(parts.path, program),
        params=as_prefix(params),
        inputs=_program.inputs_of(program),
        outputs=_program.outputs_of(program),
        platforms=tuple(program.platforms),
        **parts.told(),
    )


def _read_program(parts: Parts) -> jax.export.Exported:
    blob = parts.part(PROGRAM).read()
    try:
        return _program.read(blob)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        parts.fail(
            f"has a program {parts.written()}, which jax {jax.__version__} does not read: later versions do for six months, "
            f"older ones for three weeks. Open it with a jax of that time, and save the function anew ({type(error).__name__})"
        )


def _read_params(parts: Parts, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    found = {}
    with TensorFile(parts.path, parts.part(PARAMS)) as file:
        stored = tensors(file)
        if stored.keys() != wanted.keys():
            name = min(stored.keys() ^ wanted.keys())
            file.fail("is missing" if name in wanted else "is none that the program takes", name)
        for name, leaf in wanted.items():
            if stored[name].shape != leaf.shape:
                file.fail(f"has the shape {stored[name].shape}, and the program takes {_program.in_words(leaf)}", name)
            values, _ = stored[name].load()
            found[name] = jax.device_put(values.astype(leaf.dtype, copy=False))
    return found


def _function(path: Path, program: jax.export.Exported) -> Callable[..., Any]:
    """Return the program as a function of any tree of its parameters, which is told in words what it does not take."""
    wanted = Tree(str(path), *_entries(_program.params_of(program), "params"))
    expected = Tree(str(path), *_entries(_program.inputs_of(program), "inputs"))
    count = len(_program.inputs_of(program))

    @jax.jit
    def run(params: Any, *inputs: Any) -> Any:
        if len(inputs) != count:
            takes = ", ".join(f"{name} {_program.in_words(leaf)}" for name, leaf in expected.named())
            raise ValueError(f"{path} takes {many(count, 'input')} ({takes}), and was given {len(inputs)}.")
        weights = wanted.aligned(flatten(params, "params"))
        given = expected.aligned(flatten(inputs, "inputs"))
        _check(path, wanted, weights)
        _check(path, expected, given)
        return program.call(wanted.build(weights), *expected.build(given))

    def fn(params: Any, *inputs: Any) -> Any:
        try:
            return run(params, *inputs)
        except ValueError as error:
            here = _platforms_of((params, inputs)) - set(program.platforms)
            if not here:
                raise
            raise ValueError(
                f"{path} was exported for {', '.join(program.platforms)}, and is called on {', '.join(here)}. Save the function "
                f"for that, too: export.save(..., platforms={[*program.platforms, *here]})."
            ) from error

    return fn


def _entries(tree: Any, what: str) -> tuple[list[str], list[str], list[Any], jax.tree_util.PyTreeDef]:
    flat = flatten(tree, what)
    return flat.paths, flat.names, flat.leaves, flat.treedef


def _check(path: Path, wanted: Tree, given: list[Any]) -> None:
    """Raise a ValueError unless arrays have the dtypes and shapes that are wanted, and a symbol one size everywhere."""
    sizes: dict[str, tuple[int, str]] = {}
    for (name, leaf), found in zip(wanted.named(), given, strict=True):
        fits = found.dtype == leaf.dtype and len(found.shape) == len(leaf.shape)
        if not fits or any(isinstance(n, int) and n != m for n, m in zip(leaf.shape, found.shape, strict=True)):
            raise ValueError(
                f"{path} takes {_program.in_words(leaf)} for {name}, and was given {_program.in_words(found)}."
            )
        for n, m in zip(leaf.shape, found.shape, strict=True):
            size, first = sizes.setdefault(str(n), (m, name))
            if size != m:
                raise ValueError(f"{path} takes one size for {n}, and was given {m} in {name}, {size} in {first}.")


def _platforms_of(tree: Any) -> set[str]:
    """Return where a program of these arrays would run, in the words of ``jax.export``."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    kinds = {device.platform for array in arrays if is_known(array) for device in array.devices()}
    default = jax.export.default_export_platform()  # which knows the maker of a GPU
    return {default if kind == "gpu" else kind for kind in kinds} or {default}
