"""Find the sites of a function: read it once, without computing anything."""

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._jaxpr import _equations
from jaxprune._tree._given import called_on
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import Tree, read_arrays
from jaxprune.sites._contractions import Use
from jaxprune.sites._origins import CONSTANT, DATA, Origin
from jaxprune.sites._pieces import Piece
from jaxprune.sites._sites import Site, Sites, Unresolved
from jaxprune.sites._views import Each, View, source_axes
from jaxprune.sites._walk import Log, Measure, Place, Tracked, Walk

# Uses of parameters, each with its site, by where they are.
Planned = dict[tuple[Place, int], tuple[Site, Use]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A function as it was read for parameters and inputs of certain shapes.

    Attributes:
        body: its jaxpr, of the leaves of the parameters, then those of the inputs.
        flat: the parameters.
        results: the tree of its results' shapes.
        sites: what was found.
        groups: for each place where an input is first met, its group.
        uses: for each place and number of a parameter there, its site and how it is used.
    """

    body: _equations.Body
    flat: Tree
    results: Any
    sites: Sites
    groups: dict[Place, int]
    uses: Planned

    def run(self, leaves: Sequence[Any], inputs: Sequence[Any], measure: Measure, groups: set[int]) -> tuple[Any, Any]:
        """Evaluate the function; return its results, and for each of the groups asked for its measurement.

        A measurement's leading axes number the matrices as the sites do, but are not yet flattened to one.
        """
        walk = Walk(measure, lambda place: self.groups[place] in groups, Log())
        values, measured = walk.run(self.body, _arguments(leaves, inputs))
        sums: dict[int, list[Any]] = {}
        for place, found in measured.items():
            sums.setdefault(self.groups[place], []).append(found)
        totals = {group: jax.tree.map(lambda *parts: sum(parts), *found) for group, found in sums.items()}
        return jax.tree.unflatten(jax.tree.structure(self.results), [value.value for value in values]), totals

    def in_order(self, paths: Container[str]) -> Planned:
        """Return the uses of parameters that can be replaced where they stand: read once, in no loop but over layers."""
        times: dict[Site, int] = {}
        for site, _ in self.uses.values():
            times[site] = times.get(site, 0) + 1
        planned: Planned = {}
        late: set[str] = set()
        for (place, number), (site, use) in self.uses.items():
            if site.path not in paths:
                continue
            loops = _equations.enclosing(self.body, place)
            over_layers = all(name == "scan" for name in loops) and len(loops) == len(use.piece.frames)
            if times[site] == 1 and over_layers and all(frame.index is None for frame in use.piece.frames):
                planned[place, number] = site, use
            else:
                late.add(site.path)
        return {at: entry for at, entry in planned.items() if entry[0].path not in late}


def read(fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Reading:
    """Read ``fn(params, *inputs)``; arrays may be given as ``jax.ShapeDtypeStruct``."""
    flat = read_arrays(params, "params")
    with called_on(fn, params, inputs):
        body, results = _equations.trace(fn, params, *inputs)
    log = Log()

    def run(leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        walk = Walk(lambda *_: None, lambda place: False, log)
        return [value.value for value in walk.run(body, _arguments(leaves, inputs))[0]]

    jax.eval_shape(run, flat.leaves, jax.tree.leaves(list(inputs)))
    return Reading(body, flat, results, *_gather_sites(log, flat))


def _arguments(leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Tracked]:
    params = [Tracked(leaf, _origin(i, leaf)) for i, leaf in enumerate(leaves)]
    return params + [Tracked(leaf, DATA) for leaf in inputs]


def _origin(position: int, leaf: Any) -> Origin:
    if not is_floating(leaf):
        return CONSTANT
    return Origin(pieces=(Piece(View(position, tuple(leaf.shape))),), leaves=frozenset([position]))


def _gather_sites(log: Log, flat: Tree) -> tuple[Sites, dict[Place, int], Planned]:
    """Merge uses of the same view into one site each, and inputs that all the same sites use into one group."""
    merged: dict[Any, list[tuple[Use, Place]]] = {}
    consumers: dict[Place, set[Any]] = {}
    for _, (use, first) in sorted(log.found.items(), key=lambda entry: entry[0]):
        key = _key(use)
        merged.setdefault(key, []).append((use, first))
        consumers.setdefault(first, set()).add(key)
    numbers: dict[Any, int] = {}
    groups = {
        first: numbers.setdefault((frozenset(consumers[first]), use.operation), len(numbers))
        for uses in merged.values()
        for use, first in uses
    }
    by_key = {key: _site(uses, groups, flat) for key, uses in merged.items()}
    sites = tuple(by_key.values())
    seen = {site.path for site in sites}
    unresolved = tuple(Unresolved(flat.paths[i], flat.names[i], reason) for i, reason in log.uses.unresolved)
    seen |= {entry.path for entry in unresolved}
    elementwise = tuple(flat.paths[i] for i in sorted(log.uses.elementwise) if flat.paths[i] not in seen)
    seen |= set(elementwise)
    floating = [path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_floating(leaf)]
    unused = tuple(path for path in floating if path not in seen)
    read_from = [site.path for site in sites if site.operation == "gather"] + [flat.paths[i] for i in log.uses.tables]
    tables = tuple(dict.fromkeys(read_from))
    found = Sites(sites, unresolved, elementwise, unused, tables)
    return found, groups, {at: (by_key[_key(use)], use) for at, (use, _) in log.found.items()}


def _key(use: Use) -> Any:
    return use.view.leaf, use.view.steps, use.matrix_shape, use.operation


def _site(uses: list[tuple[Use, Place]], groups: dict[Place, int], flat: Tree) -> Site:
    use = uses[0][0]
    leaf = use.view.leaf
    shape = tuple(jnp.shape(flat.leaves[leaf]))
    *stack, contracted, free = source_axes(use.view.steps, shape)
    inner = source_axes(use.piece.view.steps, shape)[use.neighbours - len(use.piece.view.shape)]
    count = 1
    for step in use.view.steps:
        count *= step.size if isinstance(step, Each) else 1
    b, i, o = use.matrix_shape
    return Site(
        path=flat.paths[leaf],
        name=flat.names[leaf],
        operation=use.operation,
        shape=shape,
        matrix_shape=(count * b, i, o),
        in_axes=tuple(sorted(contracted)),
        out_axes=tuple(sorted(free)),
        stack_axes=tuple(sorted(frozenset[int]().union(*stack))),
        input_axis=next(iter(inner)) if len(inner) == 1 else None,
        groups=tuple(sorted({groups[first] for _, first in uses})),
        exact=all(use.view.exact for use, _ in uses),
        steps=use.view.steps,
    )


def find_sites(fn: Callable[..., Any], params: Any, *inputs: Any) -> Sites:
    """Find where a function multiplies its inputs by its parameters: which leaf, by which operation, along which axes.

    Reads the jaxpr of ``fn(params, *inputs)``, so any JAX function will do, in any framework; nothing is computed.
    Follows a parameter through casts, transposes, reshapes, slices, splits, concatenations and stacks, through masks and other
    elementwise changes, and into jit, remat, custom derivatives, cond, while and scan. A stack of layers that a scan
    walks through, or that is indexed, is one site with a matrix for each layer; a parameter used more than once in
    the same way is one site, too. A parameter that is repeated for every sample (a learned query) is data to what projects it. What is not understood is listed with its reason in `unresolved`, never left out.

    Args:
        fn: a function ``fn(params, *inputs)``; for example ``lambda params, x: model.apply({"params": params}, x)``.
        params: a pytree of arrays, or of ``jax.ShapeDtypeStruct``.
        *inputs: what fn takes besides; trees of arrays or of ``jax.ShapeDtypeStruct``. Only shapes and dtypes matter.

    Returns:
        The `Sites`, to print, to iterate over, and to give to whatever takes ``sites=``: `make_masks` then knows which
        leaves multiply data, along which axes their inputs and outputs lie, and which axes count layers.

    Raises:
        TypeError: a leaf of params is no array, or fn is no function of params and these inputs.

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros((1, 2))}
    >>> sites = find_sites(lambda p, x: jax.nn.relu(x @ p["kernel"] + p["bias"]), params, jnp.zeros((4, 3)))
    >>> [(site.path, site.operation, site.in_axes, site.out_axes) for site in sites], sites.elementwise
    ([('kernel', 'dot', (0,), (1,))], ('bias',))
    """
    return read(fn, params, inputs).sites
