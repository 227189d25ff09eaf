"""Rows of a table that a run writes one after the other, so that it can be stopped and gone on with."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Generic, TypeVar

from _support.options import UsageError

Row = TypeVar("Row")  # a dataclass of what JSON can hold


class Results(Generic[Row]):
    """The rows so far, in `results.json`, beside the settings that they were found with."""

    def __init__(self, folder: Path, kind: type[Row], settings: dict[str, Any], *, resume: bool) -> None:
        """Begin anew, or with what a run with the same settings has found.

        Raises:
          UsageError: there is nothing to resume, or it was found with other settings.
        """
        self._path, self._settings, self.rows = folder / "results.json", settings, list[Row]()
        if not resume:
            return
        try:
            before = json.loads(self._path.read_text())
            self.rows = [kind(**row) for row in before["rows"]]
            different = [name for name, value in settings.items() if before["settings"][name] != value]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{folder} holds no run to resume (results.json cannot be read)") from error
        if different:
            option = different[0].replace("_", "-")
            raise UsageError(
                f"the run in {folder} has another --{option}; resume it with its own, or choose another --out"
            )

    def has(self, **known: Any) -> bool:
        """Whether a row is there already."""
        return any(all(getattr(row, name) == value for name, value in known.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a row; the file is replaced in one step."""
        self.rows.append(row)
        found = {"settings": self._settings, "rows": [dataclasses.asdict(row) for row in self.rows]}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(temporary, self._path)
