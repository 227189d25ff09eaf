"""What importing jaxprune costs beside the two libraries it stands on, in fresh processes.

python -m benchmarks.imports
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import timing

STATEMENTS = ("import jax, optax", "import jax, optax, jaxprune")


def _fresh(statement: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, each of three processes")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    rows = timing.compare({statement: _fresh(statement) for statement in STATEMENTS}, options.repeats)
    Console().print(timing.table("a process that imports", rows))
    timing.write_json(options.json, [row._asdict() for row in rows])


if __name__ == "__main__":
    main()
