"""At which updates masks change, and what a schedule is there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

# How many values of a schedule are looked at before training, at most; and how many where it never ends.
_MOST_LOOKED_AT = 100_000
_LOOKED_AHEAD = 10_000


class Steps(NamedTuple):
    """The numbers of the updates, from 0 on, that change masks: begin, begin + every, ..., and until, the last one."""

    every: int
    begin: int
    until: int | None

    def check(self, title: str) -> None:
        """Raise a ValueError unless every >= 1 and 0 <= begin <= until."""
        if self.every < 1:
            raise ValueError(
                f"{title} takes every >= 1, the updates from one change of masks to the next; got {self.every}."
            )
        if self.begin < 0:
            raise ValueError(
                f"{title} takes begin >= 0, the number of the first update that changes masks; got {self.begin}."
            )
        if self.until is not None and self.until < self.begin:
            wanted = f"until >= {self.begin}" if self.begin else "until >= 0"
            raise ValueError(
                f"{title} takes {wanted}, the number of the last update that changes masks; got {self.until}."
            )

    def due(self, count: jax.Array) -> jax.Array:
        """Whether masks change at this update."""
        regular = ((count - self.begin) % self.every == 0) & (count >= self.begin)
        return regular if self.until is None else (regular & (count < self.until)) | (count == self.until)

    def latest(self, count: int) -> int | None:
        """Return the number of the last update up to this one that changes masks; None where there was none."""
        if count < self.begin:
            return None
        if self.until is not None and count >= self.until:
            return self.until
        return count - (count - self.begin) % self.every

    def when_due(self, count: jax.Array, change: Callable[..., Any], masks: Any, *read: Any) -> Any:
        """Return ``change(masks, *read)`` if masks change at this update, else the masks.

        A loop of one turn or none: its state stays where it is in memory, where a conditional would copy the masks at
        every update. Nothing of `read` is differentiated: such a loop has no gradient.
        """

        def turn(i: jax.Array, masks: Any) -> Any:
            # What does not depend on the turn would be computed before the loop, at every update.
            arrays, _ = jax.lax.optimization_barrier((jax.lax.stop_gradient(read), i))
            return change(masks, *arrays)

        return jax.lax.fori_loop(0, self.due(count).astype(np.int32), turn, masks)

    def range_of(self, title: str, schedule: optax.ScalarOrSchedule) -> tuple[float, float] | None:
        """Return the least and the largest value of a schedule where masks change; None where it is not known yet."""
        values: Any = schedule
        if callable(schedule):
            last = self.begin + _LOOKED_AHEAD * self.every if self.until is None else self.until
            stride = self.every * max(1, (last - self.begin) // self.every // _MOST_LOOKED_AT)
            steps = np.unique(np.append(np.arange(self.begin, last, stride), last)).astype(np.int32)
            with jax.ensure_compile_time_eval():  # also where init is traced
                values = jax.vmap(schedule)(steps)
            if np.shape(values) != steps.shape:
                raise ValueError(
                    f"{title} takes a schedule of one number; it gave an array of shape {values.shape[1:]}."
                )
        if isinstance(values, jax.core.Tracer):
            return None
        return float(np.min(np.asarray(values))), float(np.max(np.asarray(values)))
