"""A log hook that writes what becomes of the masks to a file, and to TensorBoard where tensorboardX is installed."""

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax

from _support.options import Settings


class MaskLog:
    """To be passed as ``log=`` to a transform: a line of JSON for each change of masks, in `masks/<phase>.jsonl`.

    A resumed run goes on with the file; a change that it makes again is the same one, and counts once. TensorBoard
    shows the folder `tensorboard`; it needs ``pip install 'jaxprune[tensorboard]'``.
    """

    def __init__(self, settings: Settings, phase: str) -> None:
        """Begin anew, or go on where the run is resumed."""
        self.path = settings.out / "masks" / f"{phase}.jsonl"
        board = settings.out / "tensorboard" / phase
        if not settings.resume:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(board, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._board = _board(board)

    def __call__(self, scalars: dict[str, float]) -> None:
        """Write the numbers of one change; called from inside the compiled training step."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        # The line's end comes first: a line that a killed process has left unfinished spoils no other.
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(finite))
        if self._board is not None:
            for name, value in scalars.items():
                if name != "step":
                    self._board.add_scalar(f"masks/{name}", value, int(scalars["step"]))

    def read(self) -> list[dict[str, float]]:
        """Return all changes so far, by step."""
        jax.effects_barrier()
        if self._board is not None:
            self._board.close()  # its flush leaves out what is still queued
        changes = map(_parse, self.path.read_text().splitlines() if self.path.exists() else [])
        by_step = {change["step"]: change for change in changes if change}
        return [by_step[step] for step in sorted(by_step)]


def _parse(line: str) -> dict[str, float] | None:
    try:
        return json.loads(line) if line else None
    except ValueError:
        return None


def _board(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder))
