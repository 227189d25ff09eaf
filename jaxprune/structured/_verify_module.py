"""Compare a module that was made anew at smaller sizes with the rebuilt function."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxprune._printing import Printable
from jaxprune._tree._paths import flatten
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import Plan
from jaxprune.structured._rebuild import rebuild
from jaxprune.structured._shrink import shrink
from jaxprune.structured._verify import difference, numbers

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class ModuleVerification(Printable):
    """What `verify_module` found; prints as a table, and is true if it passed.

    Attributes:
        errors: for the path of each output the largest difference, relative to its largest magnitude.
        tolerance: the largest that passes.
    """

    errors: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether all outputs equal those of the rebuilt function."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __bool__(self) -> bool:
        """Whether it passed."""
        return self.passed

    def __rich__(self) -> "Table":
        """Return the table for rich to print."""
        from rich.table import Table

        verdict = "equals" if self.passed else "does NOT equal"
        table = Table(title=f"The module {verdict} the rebuilt function (to {self.tolerance:g})")
        table.add_column("output")
        table.add_column("difference", justify="right")
        for path, error in self.errors.items():
            style = None if error <= self.tolerance else "bold"
            table.add_row(path or "(the output)", f"{error:.1e}", style=style)
        return table


def verify_module(
    graph: Graph,
    plan: Plan,
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    tolerance: float = 1e-5,
) -> ModuleVerification:
    """Run a module of the sizes that `recover` found beside the rebuilt function, and compare every output.

    Equal shapes are not yet equal functions. The rebuilt function is that of ``counts="rescaled"``, whose normalisation
    layers divide by the number of channels that stay, as the module does. Known to differ: attention of which heads'
    *dimensions* were cut, since a smaller module divides its scores by the square root of those that stay, the rebuilt
    function by that of those there were (cutting whole heads changes nothing of it); and whatever else the module
    computes from a size alone, as the groups of a normalisation layer.

    Args:
        graph: the original function, by `trace`.
        plan: the channels that stay.
        fn: the module's function, ``fn(small_params, *inputs)``.
        params: the parameters before they are cut.
        *inputs: the function's other arguments.
        tolerance: the largest difference that passes, relative to the largest magnitude of an output.

    Returns:
        The differences by output; infinite where shapes differ, or where only one of the two is finite.

    Raises:
        ValueError: the outputs of the two have other paths; the plan does not fit. What `fn` raises is passed on.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured._trace import trace
    >>> def fn(params, x):
    ...     return (x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[1.0], [1.0], [1.0]])}
    >>> graph = trace(fn, params, jnp.ones((2, 1)))
    >>> plan = Plan({"up": {1: (0, 2)}, "down": {0: (0, 2)}}, {"up": (1, 3), "down": (3, 1)})
    >>> verify_module(graph, plan, fn, params, jnp.ones((2, 1))).errors
    {'': 0.0}
    """
    small = shrink(plan, params)
    expected = flatten(rebuild(graph, plan, counts="rescaled")(small, *inputs), "the rebuilt function's outputs")
    found = flatten(fn(small, *inputs), "the module's outputs")
    leaves = expected.aligned(found)
    pairs = [(numbers(a), numbers(b)) for a, b in zip(leaves, expected.leaves, strict=True)]
    errors = [difference(a, b) if a.shape == b.shape else float("inf") for a, b in pairs]
    return ModuleVerification(dict(zip(expected.paths, errors, strict=True)), tolerance)
