"""How hard the training examples are to break: killed at random moments, they resume and end in the same bits.

    python -m benchmarks.example_kills

Each example trains once without interruption. Then it is started again and again in a folder of its own, killed (SIGKILL) at
a random moment or, every other time, while a checkpoint is being written, and resumed, until it comes to its end; after so
many kills its results and its last checkpoints are compared bit for bit with those of the run that nothing stopped.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import timing
from benchmarks.storage_hardness import in_child

ROOT = Path(__file__).parents[1]
COMMON = ("--small", "--save-every", "1", "--epochs", "6")
EXAMPLES = {
    "cnn": ("--fine-tune-epochs", "4", "--ks", "1.5", "2"),
    "cnn_nnx": ("--fine-tune-epochs", "4", "--ks", "1.5", "2"),
    "gradual": (),
    "rigl": (),
}


def run(name: str, out: Path, data: Path, *, resume: bool) -> None:
    """Run an example in this process, what it prints going to a file; end the process with its code."""
    sys.path.insert(0, str(ROOT / "examples"))
    arguments = [
        *COMMON,
        *EXAMPLES[name],
        "--out",
        str(out),
        "--data-dir",
        str(data),
        *(["--resume"] if resume else []),
    ]
    with (out.parent / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        code = __import__(name).main(arguments)
    os._exit(code)


def bits(out: Path, target: Path) -> None:
    """Write what a run has come to: its results, and a digest of all arrays of its last checkpoints."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found: dict[str, Any] = {"results": json.loads((out / "results.json").read_text())}
    for phase in sorted((out / "checkpoint").iterdir()):
        with ocp.CheckpointManager(phase, item_names=("params", "masks", "opt_state", "progress")) as manager:
            items = dict.fromkeys(("params", "masks", "opt_state"), ocp.args.StandardRestore())
            saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
        leaves = jax.tree_util.tree_leaves_with_path([saved[name] for name in items])
        digest = hashlib.sha256()
        for path, leaf in leaves:
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        found[phase.name] = digest.hexdigest()
    target.write_text(json.dumps(found, sort_keys=True))


def finished(child: int) -> int | None:
    """Return the exit code of a child that has ended, -9 where it was killed; None while it runs."""
    ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def kill_once(child: int, out: Path, seconds: float, *, saving: bool, rng: random.Random) -> tuple[int, bool]:
    """Kill a child after a random time, or from then on while it saves; return its exit code, and whether it was saving."""
    moment = time.monotonic() + rng.uniform(0, seconds)
    while (code := finished(child)) is None:
        now_saving = any(out.glob("checkpoint/*/*orbax-checkpoint-tmp*"))
        if time.monotonic() >= moment and (now_saving or not saving):
            time.sleep(rng.uniform(0, 0.01) if saving else 0.0)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), now_saving
        time.sleep(0.001)
    return code, False


def in_turn(action: Callable[[], None]) -> float:
    """Run an action in a process of its own to its end; return how long it took."""
    begin = time.monotonic()
    status = os.waitpid(in_child(action), 0)[1]
    if status:
        raise RuntimeError(f"a process that nobody killed ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - begin


def kills(name: str, count: int, folder: Path, seed: int, console: Console) -> dict[str, int]:
    """Kill an example so many times; return the counts."""
    rng, data = random.Random(seed), folder / "data"
    found: collections.Counter[str] = collections.Counter(killed=0, saving=0, compared=0, different=0, failed=0)
    whole, out = folder / name / "whole", folder / name / "run"
    whole.mkdir(parents=True)
    in_turn(lambda: run(name, whole, data, resume=False))  # prepares the data, and compiles
    seconds = in_turn(lambda: run(name, whole, data, resume=False))
    in_turn(lambda: bits(whole, folder / "expected"))
    for number in track(range(count), f"kills of {name}", console=console):
        while found["killed"] <= number:
            resume = (out / "results.json").exists()
            out.mkdir(exist_ok=True)
            child = in_child(lambda resume=resume: run(name, out, data, resume=resume))
            # Shorter than a run, so that some kills come early; a run that is resumed has less to do.
            code, saving = kill_once(child, out, 0.7 * seconds, saving=number % 2 == 1, rng=rng)
            found["killed"] += code == -signal.SIGKILL
            found["saving"] += saving
            if code not in (0, -signal.SIGKILL):
                found["failed"] += 1
                console.print((out.parent / "log").read_text()[-2_000:], markup=False)
                shutil.rmtree(out)
            elif code == 0:
                _compare(out, folder, found)
    in_turn(lambda: run(name, out, data, resume=(out / "results.json").exists()))
    _compare(out, folder, found)
    return dict(found)


def _compare(out: Path, folder: Path, found: collections.Counter[str]) -> None:
    (folder / "found").unlink(missing_ok=True)  # a process that fails leaves none
    in_turn(lambda: bits(out, folder / "found"))
    found["compared"] += 1
    found["different"] += (folder / "found").read_text() != (folder / "expected").read_text()
    shutil.rmtree(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill every example, print the counts; return 1 if one ended elsewhere or could not be resumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="(default: all)")
    parser.add_argument("--kills", type=int, default=50, help="of all examples together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args(arguments)
    console = Console()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        for number, name in enumerate(options.examples):
            share = options.kills * (number + 1) // len(options.examples) - options.kills * number // len(
                options.examples
            )
            results[name] = kills(name, share, Path(folder), options.seed + number, console)
            console.print(f"{name}: {results[name]}")
    console.print_json(data=results)
    timing.write_json(options.json, results)
    return int(any(found["different"] or found["failed"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
