"""Compare the smaller function with the original in which the same channels are masked."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._masks import apply_masks
from jaxprune._printing import Printable, some
from jaxprune._tree._paths import flatten
from jaxprune.structured._axes._layered import take_kept
from jaxprune.structured._axes._replay import Replay
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._plan import Plan, layered_groups, require_plan, shallower, solve
from jaxprune.structured._rebuild import at_shapes, evaluate, masked, rebuild, whole_shapes
from jaxprune.structured._rounding import tolerances
from jaxprune.structured._shrink import channel_masks, cut_inputs, cut_out

if TYPE_CHECKING:
    from jaxprune._tables import Table


@dataclasses.dataclass(frozen=True)
class OutputError:
    """How far one output is from what it should be.

    Attributes:
        path: of the output.
        difference: the largest, relative to the largest magnitude; infinite where only one of the two is finite.
        tolerance: the largest difference that passes.
        zeroed: of `verify`, the same from the original function with masked parameters. It is no error: a normalisation
            layer or a later bias may fill a zeroed channel again.
    """

    path: str
    difference: float
    tolerance: float
    zeroed: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the output is what it should be."""
        return self.difference <= self.tolerance


@dataclasses.dataclass(frozen=True, repr=False)
class Verification(Printable):
    """What `verify` or `verify_module` found; prints as a table, and is true if it passed.

    Attributes:
        found: what was compared.
        expected: what it was compared with.
        outputs: how far they are from each other, by output.
    """

    found: str
    expected: str
    outputs: tuple[OutputError, ...]

    @property
    def passed(self) -> bool:
        """Whether all outputs equal those that were expected."""
        return all(output.passed for output in self.outputs)

    def __bool__(self) -> bool:
        """Whether it passed."""
        return self.passed

    def _in_short(self) -> str:
        return f"{self.found} {'equals' if self.passed else 'does NOT equal'} {self.expected}"

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title=self._in_short())
        both = any(output.zeroed is not None for output in self.outputs)
        table.add_column("output")
        for column in ("tolerance", *(("from masked channels", "from masked parameters") if both else ("difference",))):
            table.add_column(column, justify="right")
        for output in self.outputs:
            style = None if output.passed else "bold"
            errors = [f"{e:.1e}" for e in (output.tolerance, output.difference, output.zeroed) if e is not None]
            table.add_row(output.path or "(the output)", *errors, style=style)
        return table


def verify(graph: Graph, plan: Plan, params: Any, *inputs: Any, tolerance: float | None = None) -> Verification:
    """Run the smaller function beside the original with the same channels masked, and compare every output.

    Differences are relative to the largest magnitude of an output; where only one of the two is finite, infinite. Both
    functions round, in float32 as in bfloat16, and a deep one carries that on: what passes follows from the coarsest dtype
    that the function computes in and from how far its outputs move when every parameter is rounded anew to that dtype. It
    is 1e-5 at least and never above one half.

    Args:
        graph: the function, by `trace`.
        plan: the channels that stay.
        params: the parameters before they are cut.
        *inputs: the function's other arguments, of any shapes that it takes; caches before they are cut.
        tolerance: the largest relative difference that passes, for every output; measured when None.

    Returns:
        The differences by output.

    Raises:
        ValueError: the plan does not fit; or it renumbers rows (`select_rows`), so that the two take other numbers: compare
            ``rebuild(graph, plan)(shrink(plan, params), new_ids(plan, ids))`` with the function's results along the rows kept.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[1.0], [1.0], [1.0]])}
    >>> graph = trace(lambda p, x: (x @ p["up"]) @ p["down"], params, jnp.ones((2, 1)))
    >>> plan = Plan({"up": {1: (0, 2)}, "down": {0: (0, 2)}}, {"up": (1, 3), "down": (3, 1)})
    >>> result = verify(graph, plan, params, jnp.ones((2, 1)))
    >>> result.passed, result.outputs[0].difference < 1e-6
    (True, True)
    """
    require_graph(graph, "verify(graph, plan, params, *inputs)")
    require_plan(plan, "verify(graph, plan, params, *inputs)")
    if plan.renumbered:
        raise ValueError(
            f"The plan renumbers the rows of {some(plan.renumbered)}: the smaller function takes other numbers than the masked one. "
            "Verify a plan without select_rows, and compare logits by new_ids."
        )
    graph = at_shapes(graph, inputs)
    kept = solve(graph, plan)
    layers = layered_groups(graph, kept)
    masks = channel_masks(plan, params)
    small = rebuild(graph, plan)(cut_out(plan, params), *cut_inputs(graph, plan, inputs))
    masked_fn = masked(graph)
    references = (
        masked_fn(params, masks, *inputs),
        jax.jit(lambda params, *inputs: evaluate(graph, Replay(), params, whole_shapes(graph), inputs, {}))(
            apply_masks(params, masks), *inputs
        ),
    )
    flat = flatten(small, "outputs")
    expected_by_path = [_by_path(reference) for reference in references]
    allowed = (
        dict.fromkeys(expected_by_path[0], tolerance)
        if tolerance is not None
        else tolerances(lambda params: masked_fn(params, masks, *inputs), params, graph.program, of_outputs)
    )
    found = []
    for path, leaf, value in zip(flat.paths, flat.leaves, shallower(graph, plan).program.outs, strict=True):
        errors = []
        for by_path in expected_by_path:
            expected = take_kept(numbers(by_path[path]), value.dims, kept, layers)
            errors.append(difference(numbers(leaf), expected))
        error, zeroed = errors
        found.append(OutputError(path, error, allowed[path], zeroed))
    return Verification("The smaller function", "the masked one", tuple(found))


def of_outputs(found: Any, expected: Any) -> float:
    """Return the difference between two outputs, arrays or random keys."""
    return difference(numbers(found), numbers(expected))


def numbers(leaf: Any) -> np.ndarray:
    """An output as numbers; of random keys their words."""
    is_key = jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _by_path(outputs: Any) -> dict[str, Any]:
    flat = flatten(outputs, "outputs")
    return dict(zip(flat.paths, flat.leaves, strict=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest magnitude expected; infinite where one alone is finite."""
    found, expected = (
        np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (found, expected)
    )
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    if same.all():
        return 0.0
    if not (np.isfinite(found[~same]).all() and np.isfinite(expected[~same]).all()):
        return float("inf")
    scale = np.abs(expected[np.isfinite(expected)]).max()
    return float(np.abs(found - expected)[~same].max() / (scale or 1.0))
