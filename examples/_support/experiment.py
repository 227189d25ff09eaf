"""What the runs share besides the network: data, phases of training with checkpoints, results on disk, exit codes."""

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import jaxprune
from _support import data
from _support.checkpoints import Checkpoints, History, State
from _support.options import Settings, SettingsOf, UsageError

# Steps that one compiled call takes. On CPUs XLA runs the gradient of a convolution ten times slower inside a loop
# than outside one (github.com/jax-ml/jax/issues/12868), so the scan over these steps is unrolled and must be short.
STEPS_PER_CALL = 4
IMAGES_PER_CALL = 1000  # of validation

# (state, images, labels, batches of indices [steps, batch]) -> state, metrics by name, each [steps]
TrainSteps = Callable[[State, jax.Array, jax.Array, np.ndarray], tuple[State, dict[str, jax.Array]]]
# (state, images, labels) -> mean metrics by name
Evaluate = Callable[[State, jax.Array, jax.Array], dict[str, jax.Array]]


class Experiment:
    """One run in one folder: trains in phases that survive being killed, and keeps `results.json` up to date."""

    def __init__(self, settings: Settings, console: Console | None = None) -> None:
        """Load the data and open the folder, before any training.

        Args:
          settings: the run.
          console: where the run reports; the standard output when None.

        Raises:
          UsageError: the folder cannot be written, holds nothing to resume, or holds a run with other settings.
          DataError: the data set cannot be had.
        """
        self.settings = settings
        # A file or a pipe has no width of its own, and rich would fold the tables into 80 columns.
        self.console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 100)
        self.results: dict[str, Any] = {}
        self._epochs_before = 0
        _check_writable(settings.out)
        if settings.resume:
            self.results = _read_results(settings)
        dataset = data.load(settings.dataset, settings.data_dir)
        if settings.small:
            dataset = dataset._replace(
                train_images=dataset.train_images[:256], train_labels=dataset.train_labels[:256],
                test_images=dataset.test_images[:128], test_labels=dataset.test_labels[:128],
            )  # fmt: skip
        if settings.batch_size * STEPS_PER_CALL > len(dataset.train_images):
            raise UsageError(
                f"--batch-size {settings.batch_size} is too large: {STEPS_PER_CALL} batches must fit into the "
                f"{len(dataset.train_images)} training images"
            )
        self.classes = dataset.classes
        self._train = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
        self._test = dataset.test_images, dataset.test_labels
        self.sample_images = self._train[0][:1]
        self.steps_per_epoch = len(dataset.train_images) // (settings.batch_size * STEPS_PER_CALL) * STEPS_PER_CALL
        self._introduce(dataset)
        if not settings.resume:
            (settings.out / "results.json").unlink(missing_ok=True)
            shutil.rmtree(settings.out / "checkpoint", ignore_errors=True)
        self.record("settings", value=settings.to_dict())

    def train(self, phase: str, state: State, train_steps: TrainSteps, epochs: int) -> State:
        """Train for some epochs, from the newest checkpoint of this phase if there is one.

        The order of the images depends on the seed and on the number of epochs trained since the run's beginning,
        so a resumed run takes the same steps as one that was never interrupted.

        Args:
          phase: its name, of the progress bar and of the folder of its checkpoints.
          state: where the phase begins.
          train_steps: takes STEPS_PER_CALL steps at once.
          epochs: how many.

        Returns:
          The state after the last epoch.
        """
        with Checkpoints(self.settings.out / "checkpoint" / phase) as checkpoints, self._progress() as progress:
            done, state, history = checkpoints.restore(state)
            bar = progress.add_task(phase, total=epochs, completed=done, metrics=_newest(history))
            for epoch in range(done + 1, epochs + 1):
                state, metrics = self._train_epoch(state, train_steps, self._epochs_before + epoch)
                for name, value in metrics.items():
                    history.setdefault(name, []).append(value)
                if epoch % self.settings.save_every == 0 or epoch == epochs:
                    checkpoints.save(epoch, state, history)
                progress.update(bar, completed=epoch, metrics=_newest(history))
        self._epochs_before += epochs
        self.record("training", phase, value=history)
        return state

    def fit(self, phase: str, state: State, train_steps: TrainSteps, evaluate: Evaluate) -> State:
        """Train for the run's epochs; print and record what `validate` finds."""
        state = self.train(phase, state, train_steps, self.settings.epochs)
        self.note(phase, self.validate(state, evaluate))
        return state

    def accuracy_by_update(self, *phases: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return for each phase the number of updates at the end of each epoch, and its training accuracy in percent."""
        found = {phase: np.array(self.results["training"][phase]["accuracy"]) for phase in phases}
        return {
            phase: (self.steps_per_epoch * np.arange(1, len(accuracy) + 1), 100 * accuracy)
            for phase, accuracy in found.items()
        }

    def validate(self, state: State, evaluate: Evaluate) -> dict[str, float]:
        """Return the mean of each metric over the test images, and the sparsity of the prunable weights."""
        images, labels = self._test
        total: dict[str, float] = {}
        for start in range(0, len(images), IMAGES_PER_CALL):
            part = slice(start, start + IMAGES_PER_CALL)
            for name, mean in evaluate(state, jnp.asarray(images[part]), jnp.asarray(labels[part])).items():
                total[name] = total.get(name, 0.0) + float(mean) * len(labels[part])
        means = {name: value / len(images) for name, value in total.items()}
        return {**means, "sparsity": float(jaxprune.sparsity(jaxprune.masks_in(state.opt_state)))}

    def note(self, name: str, found: dict[str, float]) -> None:
        """Print and record what `validate` found."""
        self.record("validation", name, value=found)
        self.say(f"{name:<10} on the test images: {_metrics(found)}; {found['sparsity']:.1%} sparse")

    def record(self, *keys: str, value: Any) -> None:
        """Put a finding into `results.json` under its keys, from the outermost; the file is replaced in one step."""
        *outer, name = keys
        place = functools.reduce(lambda within, key: within.setdefault(key, {}), outer, self.results)
        place[name] = value
        target = self.settings.out / "results.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=2) + "\n")
        os.replace(temporary, target)

    def say(self, *parts: Any) -> None:
        """Print for the user."""
        self.console.print(*parts)

    def _train_epoch(self, state: State, train_steps: TrainSteps, epoch: int) -> tuple[State, dict[str, float]]:
        size = self.settings.batch_size
        groups = data.epoch_indices(len(self._train[0]), size * STEPS_PER_CALL, seed=self.settings.seed, epoch=epoch)
        calls = []
        for batches in groups.reshape(-1, STEPS_PER_CALL, size):
            state, metrics = train_steps(state, *self._train, batches)
            calls.append(metrics)
        means = jax.tree.map(lambda *values: float(np.mean(values)), *calls)
        return state, means

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<10}"), BarColumn(bar_width=8), MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"), console=self.console,
        )  # fmt: skip

    def _introduce(self, dataset: data.Dataset) -> None:
        train, test, device = dataset.train_images, dataset.test_images, jax.devices()[0]
        shape = " x ".join(map(str, train.shape[1:]))
        self.say(
            f"data    {dataset.name}: {len(train):,} images to train on, {len(test):,} to test on, {shape}\n"
            f"device  {device.platform} ({device.device_kind}), jax {jax.__version__}"
        )


def run_program(
    parse: Callable[[Sequence[str] | None], SettingsOf],
    run: Callable[[Experiment, SettingsOf], None],
    arguments: Sequence[str] | None,
) -> int:
    """Read the command line, open the run's folder and run; return the exit code, as `exit_code` does."""

    def program() -> None:
        settings = parse(arguments)
        run(Experiment(settings), settings)

    return exit_code(program)


def exit_code(program: Callable[[], None]) -> int:
    """Run a program and return its exit code: 0, 2 for what the user can mend (one line on stderr), 130 if stopped."""
    try:
        program()
    except (UsageError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command with --resume continues", file=sys.stderr)
        return 130
    return 0


def _metrics(values: dict[str, float]) -> str:
    form = {"loss": "loss {:.4f}", "accuracy": "accuracy {:.2%}", "gradient_norm": "gradient norm {:.3f}"}
    return ", ".join(text.format(values[name]) for name, text in form.items() if name in values)


def _newest(history: History) -> str:
    return _metrics({name: values[-1] for name, values in history.items()})


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be written ({error.strerror}); choose another --out") from error


def _read_results(settings: Settings) -> dict[str, Any]:
    path = settings.out / "results.json"
    try:
        results = json.loads(path.read_text())
        before = results["settings"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{settings.out} holds no run to resume ({path.name} cannot be read)") from error
    for name, value in settings.to_dict().items():
        if before.get(name) != value:
            raise UsageError(
                f"the run in {settings.out} has {name.replace('_', '-')} {before.get(name)}, not {value}; resume it "
                "with its own settings, or choose another --out"
            )
    return results
