"""What a function takes at other widths, measured on the device at hand: a cost that `allocate_widths` takes."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxprune._printing import Printable, many, some
from jaxprune.structured._axes._dims import Var
from jaxprune.structured._axes._program import Node
from jaxprune.structured._blocks import Block
from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._json import read_json
from jaxprune.structured._plan import Plan, dropped_branches, plan_of, solve

if TYPE_CHECKING:
    from jaxprune._tables import Table

# A group of which a width stays, a scan of which so many layers do, or a branch of which nothing does.
Part = ChannelGroup | Block


def cut(graph: Graph, parts: Iterable[tuple[Part, int]]) -> Plan:
    """Return the plan that keeps so many of each part, the first ones."""
    kept, branches = {}, []
    for part, width in parts:
        if isinstance(part, Block) and isinstance(part.place, Node):
            branches.append(part)
        elif width < part.size:
            kept[_var(part)] = np.arange(width)
    return plan_of(graph, kept, branches)


def _var(part: Part) -> Var:
    """Return the axis of a group's channels, or of a scan's layers."""
    found = part.place if isinstance(part, Block) else part.var
    assert isinstance(found, Var)
    return found


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Times(Printable):
    """What a function takes, in seconds, with one group alone cut or one branch alone dropped; called with a plan, what it takes then.

    Between widths that were measured times are interpolated. What several cuts save adds up, but for what they have in common: where
    two groups share a matrix, they save fewer multiply-accumulates together than the sum of what each saves alone. How much of
    that share of the time is had only once was measured with all groups cut at once. Where layers of a scan go, what is cut in
    each of them saves as much less as there are fewer. Prints as a table.

    Attributes:
        graph: the function.
        device: what it ran on.
        whole: of the whole function.
        widths: by the name of each group, for widths that rise, never falling.
        blocks: without each residual branch, by its name; by the name of a scan, without one of its layers.
        overlap: by which share the sum of what cuts save is to be less, of that by which their multiply-accumulates are: 0 to 1.
    """

    graph: Graph
    device: str
    whole: float
    widths: Mapping[str, Mapping[int, float]]
    blocks: Mapping[str, float]
    overlap: float
    _alone: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __call__(self, plan: Plan) -> float:
        """Return the seconds expected of the smaller function.

        Raises:
            ValueError: the plan cuts or drops what was not measured, or does not fit the graph.
        """
        found = self._parts(plan)
        saved = sum(share * self._saved(*each) for each, share in zip(found, _shares(found), strict=True))
        return self.whole - saved * max(1 - self.overlap * self.had_twice(found, plan), 0.0)

    def _parts(self, plan: Plan) -> list[tuple[Part, int]]:
        """Return what a plan keeps of what it cuts or drops, without what goes with a branch."""
        branches = dropped_branches(self.graph, plan)
        outermost = [block for block in branches if not any(set(block.paths) < set(other.paths) for other in branches)]
        found: list[tuple[Part, int]] = [(block, 0) for block in outermost]
        parts: list[Part] = [*self.graph.groups, *(block for block in self.graph.blocks if block.members)]
        by_var = {_var(part): part for part in parts}
        for var, indices in solve(self.graph, plan).items():
            if not _paths(by_var[var]) <= set(plan.dropped):
                found.append((by_var[var], indices.shape[-1]))
        return found

    def _saved(self, part: Part, width: int) -> float:
        table: Mapping[str, object] = self.blocks if isinstance(part, Block) else self.widths
        if part.name not in table:
            raise ValueError(
                f"The plan cuts {part.name}, of which no time is known; measure_times with it among the others."
            )
        if isinstance(part, Block):
            return (part.size - width) * (self.whole - self.blocks[part.name])
        widths = self.widths[part.name]
        return self.whole - float(np.interp(width, list(widths), list(widths.values())))

    def had_twice(self, parts: Sequence[tuple[Part, int]], plan: Plan) -> float:
        """Return by which share the multiply-accumulates that cuts save together are fewer than the sum of those of each alone."""
        alone = sum(share * self.macs_saved(*each) for each, share in zip(parts, _shares(parts), strict=True))
        together = count_macs(self.graph) - count_macs(self.graph, plan)
        return max(1 - together / alone, 0.0) if alone else 0.0

    def macs_saved(self, part: Part, width: int) -> int:
        """Return the multiply-accumulates that are saved where so many of a part stay, and all of everything else."""
        key = part.name if isinstance(part, ChannelGroup) else f"dropped {part.name}", width
        if key not in self._alone:
            self._alone[key] = count_macs(self.graph) - count_macs(self.graph, cut(self.graph, [(part, width)]))
        return self._alone[key]

    def to_json(self) -> str:
        """Return the times as JSON text, with the device and the version of JAX; `from_json` reads them."""
        parts = {"device": self.device, "jax": jax.__version__, "whole": self.whole, "overlap": self.overlap}
        return json.dumps({**parts, "widths": self.widths, "blocks": self.blocks}, indent=1)

    @classmethod
    def from_json(cls, text: str, graph: Graph) -> "Times":
        """Read what `to_json` wrote, of a graph of the same function.

        Raises:
            ValueError: it did not write that; or the graph has not the groups or the branches that were measured.
        """
        parts = read_json(text, ["device", "whole", "overlap", "widths", "blocks"], "Times")
        widths = {name: {int(n): seconds for n, seconds in table.items()} for name, table in parts["widths"].items()}
        sizes = {group.name: group.size for group in graph.groups}
        names = {block.name for block in graph.blocks}
        others = [name for name, table in widths.items() if sizes.get(name) != max(table)]
        others += [name for name in parts["blocks"] if name not in names]
        if others:
            raise ValueError(
                f"The times are of another function: this one has no {some(others)} of that size. Measure anew."
            )
        return cls(graph, parts["device"], parts["whole"], widths, parts["blocks"], parts["overlap"])

    def _in_short(self) -> str:
        return (
            f"{1e3 * self.whole:.3g} ms on {self.device}; {many(len(self.widths), 'group')} and "
            f"{many(len(self.blocks), 'block')} measured"
        )

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title=self._in_short())
        for column in ("group or branch", "widths", "ms"):
            table.add_column(column)
        for name, widths in self.widths.items():
            table.add_row(name, ", ".join(map(str, widths)), ", ".join(f"{1e3 * s:.3g}" for s in widths.values()))
        sizes = {block.name: block.size for block in self.graph.blocks}
        for name, without in self.blocks.items():
            table.add_row(name, "dropped" if sizes[name] == 1 else "1 layer dropped", f"{1e3 * without:.3g}")
        return table


def _paths(part: Part) -> set[str]:
    return set(part.paths) if isinstance(part, Block) else {member.path for member in part.members}


def _shares(parts: Sequence[tuple[Part, int]]) -> list[float]:
    """Return of which share of the layers that a part is in are left: 1 for what is in no scan that layers go from."""
    scans = [(part, width / part.size) for part, width in parts if isinstance(part, Block) and part.members]
    return [
        math.prod(left for scan, left in scans if scan is not part and _paths(part) <= set(scan.paths))
        for part, _ in parts
    ]
