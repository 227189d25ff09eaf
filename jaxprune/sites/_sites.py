"""Sites: where a function multiplies its inputs by a parameter, and how to see that parameter as matrices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune._printing import Printable, in_order, many
from jaxprune._tree._axes import Axes as Roles
from jaxprune._tree._paths import Tree, flatten
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.sites._views import Axes, Each, Entry, Step, apply_steps, restore_steps

if TYPE_CHECKING:
    from jaxprune._tables import Table

Operation = Literal["dot", "conv", "gather"]

# What there is to do about a leaf that a function cannot prune: some choose leaves, others are given masks.
LEAVE_DENSE = "Leave this parameter dense with prunable=..., or with None in masks."


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter that multiplies data, seen as ``[N, I, O]`` matrices: y = x W, whatever the framework's layout.

    N counts every axis of copies (stacked layers, batch axes, experts, groups of a convolution), flattened in
    row-major order; I is what is contracted (inputs, in the order of the data's axes; for a convolution input
    channels, then the window), O the outputs. Plain data: hashable, comparable, no arrays.

    Attributes:
        path: the leaf's normalised path, ``block/dense/kernel``.
        name: the leaf's name in messages, ``params['block']['dense']['kernel']``.
        operation: ``"dot"``, ``"conv"`` or ``"gather"`` (a table from which rows are read: I numbers the rows).
        shape: the shape of the leaf.
        matrix_shape: (N, I, O).
        in_axes: the axes of the leaf along which I runs.
        out_axes: the axes of the leaf along which O runs.
        stack_axes: the axes of the leaf along which N runs.
        input_axis: the axis of the leaf along which neighbouring inputs lie (of a convolution the channels), for N:M
            patterns; None where they are not one axis.
        groups: the inputs that this site multiplies. Sites with the same groups share their statistics (q, k, v); a
            site has several groups where a parameter is used more than once.
        exact: whether the values that multiply are the leaf's own (but for casts); False where elementwise operations
            with other parameters or constants (a mask, a norm, fake quantisation) lie between.
        steps: the layout operations that lead from the leaf to the matrices.
    """

    path: str
    name: str
    operation: Operation
    shape: Axes
    matrix_shape: tuple[int, int, int]
    in_axes: Axes
    out_axes: Axes
    stack_axes: Axes
    input_axis: int | None
    groups: tuple[int, ...]
    exact: bool
    steps: tuple[Step, ...]

    def matrices(self, leaf: Any) -> jax.Array:
        """Return the leaf, an array of `shape` and any dtype (a mask, scores), as matrices ``[N, I, O]``."""
        self._check(leaf)
        leaf = jnp.asarray(leaf)
        return _auto(lambda x: apply_steps(self.steps, x).reshape(self.matrix_shape), leaf, self._matrix_spec(leaf))(
            leaf
        )

    def put(self, leaf: Any, matrices: jax.Array) -> jax.Array:
        """Return the leaf with the entries this site multiplies by replaced by `matrices`; all others stay.

        The inverse of `matrices`: ``site.put(leaf, site.matrices(leaf))`` is the leaf, and where the site sees
        all of the leaf, the leaf's old values do not matter. The leaf's dtype stays.

        Args:
            leaf: an array of `shape`.
            matrices: ``[N, I, O]``.
        """
        self._check(leaf)
        if matrices.shape != self.matrix_shape:
            raise ValueError(f"{self.name} is seen as matrices of shape {self.matrix_shape}, not {matrices.shape}.")
        leaf = jnp.asarray(leaf)

        def put(leaf: jax.Array, matrices: jax.Array) -> jax.Array:
            seen = jax.eval_shape(lambda x: apply_steps(self.steps, x), leaf).shape
            return restore_steps(self.steps, leaf, matrices.reshape(seen).astype(leaf.dtype))

        return without_explicit_axes(put, leaf)(leaf, matrices)

    @property
    def covers(self) -> bool:
        """Whether the site sees every entry of the leaf; False for a part of a fused parameter."""
        return math.prod(self.matrix_shape) == math.prod(self.shape)

    @property
    def layer_axes(self) -> Axes:
        """The axes of the leaf that count copies alone: layers, experts; not those that groups of a convolution share."""
        return tuple(axis for axis in self.stack_axes if axis not in (*self.in_axes, *self.out_axes))

    @property
    def layers(self) -> int:
        """The number of its layers: of what a scan, or an index, goes through one by one."""
        return math.prod(step.size for step in self.steps if isinstance(step, Each))

    def entry(self, index: Sequence[int]) -> "Site":
        """Return the site of one layer of a stack alone: `index` has a number for each axis of the stack."""
        numbers = iter(index)
        steps = tuple(Entry(next(numbers)) if isinstance(step, Each) else step for step in self.steps)
        n, i, o = self.matrix_shape
        return dataclasses.replace(self, steps=steps, matrix_shape=(n // self.layers, i, o))

    @property
    def leading(self) -> int:
        """How many leading axes of the leaf are gone through layer by layer."""
        return next((i for i, step in enumerate(self.steps) if not isinstance(step, Each)), len(self.steps))

    def slice(self) -> "Site":
        """Return the site as it is in one layer of the leaf, ``leaf[index]`` with a number for each of the `leading` axes."""
        cut = self.leading

        def inner(axes: Axes) -> Axes:
            return tuple(axis - cut for axis in axes if axis >= cut)

        n, i, o = self.matrix_shape
        return dataclasses.replace(
            self,
            shape=self.shape[cut:],
            matrix_shape=(n // math.prod(self.shape[:cut]), i, o),
            in_axes=inner(self.in_axes),
            out_axes=inner(self.out_axes),
            stack_axes=inner(self.stack_axes),
            input_axis=None if self.input_axis is None else self.input_axis - cut,
            steps=self.steps[cut:],
        )

    def _check(self, leaf: Any) -> None:
        if jnp.shape(leaf) != self.shape:
            raise ValueError(
                f"{self.name} has shape {jnp.shape(leaf)}, but {self.shape} where the sites were found. "
                "Find the sites (or calibrate) anew with these parameters."
            )

    def _matrix_spec(self, leaf: jax.Array) -> PartitionSpec:
        """The outputs stay sharded where they are one sharded axis of the leaf; the rest is whole."""
        sharding = jax.typeof(leaf).sharding
        if len(self.out_axes) != 1 or AxisType.Explicit not in sharding.mesh.axis_types:
            return PartitionSpec()
        axes = sharding.spec[self.out_axes[0]]
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        return PartitionSpec(None, None, axes if self.matrix_shape[2] % parts == 0 else None)


def _auto(function: Callable[..., jax.Array], like: jax.Array, spec: PartitionSpec) -> Callable[..., jax.Array]:
    mesh = jax.typeof(like).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """A use of a parameter that the reader does not understand.

    Attributes:
        path: the leaf's normalised path.
        name: the leaf's name in messages.
        reason: what it does with the leaf.
    """

    path: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Sites(Printable):
    """Every site of a function, in the order of its operations; iterable, and prints as a table.

    Attributes:
        sites: the sites, one for each parameter (or part of one) and way of seeing it.
        unresolved: uses of parameters that were not understood, each with its reason.
        elementwise: paths of parameters that only meet data elementwise (biases, scales, position tables, also a scale that is
            written as an einsum), or stand in its place (learned queries).
        unused: paths of parameters that meet no data at all.
        tables: paths of parameters of which rows are read, by an index or by one-hot vectors, whatever else is done with them
            (the distances to a codebook).
    """

    sites: tuple[Site, ...]
    unresolved: tuple[Unresolved, ...] = ()
    elementwise: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        """Iterate over the sites."""
        return iter(self.sites)

    # Asked for every leaf.
    @functools.cached_property
    def _by_path(self) -> dict[str, tuple[Site, ...]]:
        found: dict[str, tuple[Site, ...]] = {}
        for site in self.sites:
            found[site.path] = (*found.get(site.path, ()), site)
        return found

    @functools.cached_property
    def _kept_out(self) -> frozenset[str]:
        return frozenset([*self.tables, *(entry.path for entry in self.unresolved)])

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self.sites)

    def at(self, path: str) -> tuple[Site, ...]:
        """Return the sites of the leaf at a path; raise a ValueError that says why where there is none."""
        found = self._by_path.get(path)
        if found is not None:
            return found
        reasons = [entry.reason for entry in self.unresolved if entry.path == path]
        if path in self.elementwise:
            reasons.append("it meets data only elementwise, as a bias or a scale does")
        if path in self.unused:
            reasons.append("the function does not use it with any data")
        known = ", ".join(sorted({site.path for site in self.sites})[:4])
        raise ValueError(
            f"No site multiplies data by {path!r}: {'; '.join(reasons) or 'there is no such leaf, or it was left out'}. "
            f"There are sites for {known or 'no leaf'}. {LEAVE_DENSE}"
        )

    def prunable(self, path: str, leaf: Any) -> bool:
        """Say whether a leaf multiplies data, by its role and not by its name; a predicate for `make_masks`.

        True for a leaf that enters products or convolutions with data and has no use that is unresolved; False for
        embedding tables, also where they are tied to an output layer.
        """
        del leaf
        return path in self._by_path and path not in self._kept_out

    def axes(self, path: str) -> Roles | None:
        """Return what the axes of a leaf are for: layers, inputs, outputs; None where it multiplies no data.

        What `make_masks` asks for under ``sites=``. Where the leaf is used in several ways, what they agree on.
        """
        found = self._by_path.get(path)
        if found is None:
            return None
        stacks = {site.layer_axes for site in found}
        stack = stacks.pop() if len(stacks) == 1 else ()
        inputs, outputs = {site.input_axis for site in found}, {site.out_axes for site in found}
        mixed = any(set(site.in_axes) & set(site.out_axes) for site in found)
        ways = " and ".join(dict.fromkeys(f"axes {site.in_axes} of {site.shape}" for site in found))
        return Roles(
            stack,
            inputs.pop() if len(inputs) == 1 else None,
            outputs.pop() if len(outputs) == 1 and not mixed else None,
            f"has its inputs along {ways}, not along one axis" + (", which its outputs share" if mixed else ""),
        )

    def require_params(self, params: Any) -> Tree:
        """Read parameters; raise a ValueError where they are not those that the sites were found in."""
        tree = flatten(params, "params")
        for site in self.sites:
            if tree.shapes.get(site.path) != site.shape:
                found = f"has shape {tree.shapes[site.path]}" if site.path in tree.shapes else "is missing"
                raise ValueError(
                    f"The statistics are of another model: {site.name} had shape {site.shape} there, but {found} here. "
                    "Calibrate anew with these parameters."
                )
        return tree

    def select(self, where: Callable[[Site], bool]) -> "Sites":
        """Return only the sites for which `where` is True; the rest of the report stays."""
        return dataclasses.replace(self, sites=tuple(site for site in self.sites if where(site)))

    def _in_short(self) -> str:
        others = {"not understood": self.unresolved, "elementwise": self.elementwise, "unused": self.unused}
        counted = [f"{len(found):,} {what}" for what, found in others.items() if found]
        return ", ".join([f"{many(len(self._by_path), 'parameter')} by which data are multiplied", *counted])

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title="Parameters that multiply data")
        table.add_column("path", overflow="fold")
        for column in ("operation", "shape", "stack axes", "in axes", "out axes"):
            table.add_column(column, justify="right" if column == "shape" else "left")
        table.add_column("shares its input with", overflow="fold")
        sharing: dict[int, list[Site]] = {}
        for site in self.sites:
            for group in site.groups:
                sharing.setdefault(group, []).append(site)
        for site in in_order(self.sites, lambda site: site.path):
            others = [other.path for group in site.groups for other in sharing[group] if other is not site]
            table.add_row(
                site.path,
                site.operation + ("" if site.exact else ", modified"),
                " x ".join(map(str, site.shape)),
                *(", ".join(map(str, axes)) for axes in (site.stack_axes, site.in_axes, site.out_axes)),
                ", ".join(dict.fromkeys(others)),
            )
        table.add_section()
        for entry in self.unresolved:
            table.add_row(entry.path, "not understood", "", "", "", "", entry.reason, style="bold red")
        for path in self.elementwise:
            table.add_row(path, "elementwise", style="dim")
        for path in self.unused:
            table.add_row(path, "unused", style="dim")
        return table
