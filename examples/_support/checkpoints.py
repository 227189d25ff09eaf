"""Orbax checkpoints of one phase of training: parameters, masks, optimizer state, and what is known so far."""

from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import jax.numpy as jnp
import orbax.checkpoint as ocp

import jaxprune
from _support.options import UsageError

# Metrics by name, one number for each finished epoch.
History = dict[str, list[float]]


class TrainingState(Protocol):
    """What a checkpoint holds; Linen's `TrainState` is one."""

    step: Any
    params: Any
    opt_state: Any

    def replace(self, *, step: Any, params: Any, opt_state: Any) -> Self:
        """Return the state with these values."""


State = TypeVar("State", bound=TrainingState)


class Checkpoints:
    """The newest checkpoint of a phase, in a folder of its own: `<folder>/<epochs done>/<item>`.

    The items are `params`, `masks` (True = keep), `opt_state` (the masks are in it too) and `progress` (JSON).
    A checkpoint appears under its name only when it is complete: a process killed while it saves leaves the one
    before. Use as a context manager, which waits for the last one to be written.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder, which need not exist."""
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for what is being saved."""
        self._manager.close()

    def save(self, epoch: int, state: TrainingState, history: History) -> None:
        """Save the state after so many epochs, and drop the checkpoint before once this one is complete."""
        standard = ocp.args.StandardSave
        self._manager.save(
            epoch,
            args=ocp.args.Composite(
                params=standard(state.params),
                masks=standard(jaxprune.masks_in(state.opt_state)),
                opt_state=standard(state.opt_state),
                progress=ocp.args.JsonSave({"step": int(state.step), "history": history}),
            ),
        )

    def restore(self, state: State) -> tuple[int, State, History]:
        """Return the newest checkpoint as (epochs done, state, history); what was given if there is none.

        Args:
          state: a state of the structure, shapes and dtypes that were saved.

        Raises:
          UsageError: there is a checkpoint, but it does not fit or is damaged.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return 0, state, {}
        standard = ocp.args.StandardRestore
        try:
            saved = self._manager.restore(
                epoch,
                args=ocp.args.Composite(
                    params=standard(state.params),
                    opt_state=standard(state.opt_state),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # Orbax, tensorstore and the file system each have errors of their own
            summary = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            raise UsageError(
                f"the checkpoint {self.folder / str(epoch)} cannot be read ({summary}); start anew without --resume"
            ) from error
        step = jnp.asarray(saved.progress["step"], state.step.dtype)
        restored = state.replace(step=step, params=saved.params, opt_state=saved.opt_state)
        return epoch, restored, saved.progress["history"]
