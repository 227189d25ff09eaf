"""How storage stands up to kills and to damaged files: counts, not times.

    python -m benchmarks.storage_hardness --kills 1000 --inputs 100_000

Kills: a process that is saving over an old file is killed (SIGKILL) at one of so many points, half of them spread over
the lines that saving executes, half over the time that it takes; the file must then be the old one or the new one, whole.
(A kill is not a power cut: for that, data and folder are synced to the disk, which no test here can prove.) Damaged files:
good files of several kinds with bytes changed, cut, moved and repeated, digits of their headers exchanged, and files with
headers put together at random; loading must succeed or raise a StorageError, and the memory it takes stays bounded.
"""

import argparse
import collections
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import timing
from jaxprune import load_sparse, save_sparse
from jaxprune.storage import StorageError
from jaxprune.storage._container import DTYPES

LIMIT = 2**27  # bytes of memory that a small file may take when it is loaded


# Kills


def a_model(value: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make a model whose weights are all one value, so that two of them cannot be confused or mixed."""
    params = {f"layer_{i}": np.full((200, 300), value, np.float32) for i in range(4)}
    return params, {name: np.arange(60_000).reshape(200, 300) % 3 == 0 for name in params}


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked process; return its process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX, about its threads: the child saves NumPy arrays and uses none
        child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def save_killed_at_line(path: Path, line: int) -> None:
    """Save, and be killed before the given line of this package is executed; count from 1."""
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if f"{os.sep}storage{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    save_sparse(path, *a_model(2.0), force=True)
    sys.settrace(None)
    (path.parent / "lines").write_text(str(seen))


def kills(count: int, folder: Path, console: Console) -> dict[str, int]:
    """Kill so many processes; return how often the file was the old one, the new one, or broken."""
    path = folder / "model"
    old = a_model(1.0)
    found: collections.Counter[str] = collections.Counter()

    def look(child: int) -> None:
        status = os.waitpid(child, 0)[1]
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            found["finished before"] += 1
            return
        found["killed"] += 1
        try:
            params, masks = load_sparse(path)
            values = {float(leaf.max()) for leaf in params.values()}
            kept = {int(mask.sum()) for mask in masks.values()}
            whole = len(params) == 4 and kept == {20_000} and values in ({1.0}, {2.0})
            found[("old" if values == {1.0} else "new") if whole else "broken"] += 1
        except (ValueError, OSError):
            found["broken"] += 1
        for left in folder.glob(".*.tmp"):
            found["temporary files left"] += 1
            left.unlink()

    save_sparse(path, *old, force=True)
    os.waitpid(in_child(lambda: save_killed_at_line(path, 0)), 0)
    lines = int((folder / "lines").read_text())
    begin = time.perf_counter()
    for _ in range(10):
        save_sparse(path, *old, force=True)
    seconds = (time.perf_counter() - begin) / 10
    for line in track(np.linspace(1, lines, count // 2).astype(int).tolist(), "kills by line", console=console):
        save_sparse(path, *old, force=True)
        look(in_child(lambda line=line: save_killed_at_line(path, line)))
    rng, by_line = random.Random(0), found["killed"]
    for i in track(range(by_line + 1, count + 1), "kills by time", console=console):
        while found["killed"] < i:
            save_sparse(path, *old, force=True)
            child = in_child(lambda: save_sparse(path, *a_model(2.0), force=True) and None)
            # A new process takes some time to begin, and a busy one longer to save.
            time.sleep(rng.uniform(0, 3 * seconds))
            os.kill(child, signal.SIGKILL)
            look(child)
    return {"lines": lines, **found}


# Damaged files


def good_files(folder: Path) -> list[bytes]:
    """Return files of every kind that the package writes."""
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.standard_normal((6, 11), np.float32)},
        "b": rng.standard_normal(5).astype(np.float16),
        "layer.weight": rng.standard_normal((2, 3, 4), np.float32),
    }
    masks = {"a": {"kernel": np.abs(params["a"]["kernel"]) > 1}, "b": None, "layer.weight": rng.random((2, 3, 4)) < 0.5}
    files = []
    for quantize in (None, 8, 4):
        for compress in (False, True):
            save_sparse(folder / "good", params, masks, quantize=quantize, compress=compress, force=True)
            files.append((folder / "good").read_bytes())
    return files


def damage(good: bytes, rng: random.Random) -> bytes:
    """Change a good file in one to five places."""
    content = bytearray(good)
    for _ in range(rng.randint(1, 5)):
        if not content:
            break
        place, length = rng.randrange(len(content)), rng.randint(1, 12)
        action = rng.randrange(7)
        if action == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            content[place] = rng.randrange(256)
        elif action == 2:
            del content[place : place + length]
        elif action == 3:
            content[place:place] = content[place : place + length]
        elif action == 4:
            other = rng.randrange(len(content))
            content[place : place + length] = content[other : other + length]
        elif action == 5:
            digits = [i for i, byte in enumerate(content[:1500]) if 48 <= byte < 58]
            if digits:
                content[rng.choice(digits)] = rng.choice(b"0123456789-.e")
        elif rng.random() < 0.2:
            del content[place:]
    return bytes(content)


def invent(rng: random.Random) -> bytes:
    """Put together a file whose header is well-formed JSON and otherwise random."""
    numbers = (0, 1, 2, 3, 8, 2**31, 2**40, 2**63, 2**64, -1, 1.5, True, None, "8", [])

    def number() -> Any:
        return rng.choice(numbers) if rng.random() < 0.3 else rng.randint(0, 9)

    header: dict[str, Any] = {}
    end = 0
    for _ in range(rng.randint(0, 6)):
        name = rng.choice(("w", "w", "a/b", "..", "", "x\n")) + rng.choice(
            ("", ".shape", ".compressed", ".bitmask", ".row_offsets", ".scale", ".weight")
        )
        dtype, shape = rng.choice((*DTYPES, "F4")), [number() for _ in range(rng.randint(0, 3))]
        size = rng.randint(0, 40)
        if all(type(n) is int for n in shape) and dtype in DTYPES and rng.random() < 0.9:
            size = abs(int(np.prod(shape, dtype=object))) * DTYPES[dtype].itemsize
        offsets = [end, end + size] if rng.random() < 0.95 else [number(), number()]
        end += size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice(({}, {"jaxprune": "{}"}, {"jaxprune": "[["}, {"k": 3}, []))
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.95 else rng.randrange(2 ** rng.randint(1, 63))
    return length.to_bytes(8, "little") + text + rng.randbytes(min(end, 4_000))


def fuzz(count: int, folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """Load so many bad files; return how often they loaded, were refused, raised something else; and the memory."""
    rng, path = random.Random(seed), folder / "bad"
    good = good_files(folder)
    found: collections.Counter[str] = collections.Counter()
    others: dict[str, int] = {}
    load_sparse(folder / "good")  # starts JAX, whose memory is not meant
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = 0
    for i in track(range(count), "damaged files", console=console):
        path.write_bytes(invent(rng) if rng.random() < 0.3 else damage(rng.choice(good), rng))
        if i % 10 == 0:
            tracemalloc.start()
        try:
            load_sparse(path)
            found["loaded"] += 1
        except StorageError:
            found["refused"] += 1
        except Exception as error:  # what must not be: counted, and shown
            found["other errors"] += 1
            others[f"{type(error).__name__}: {error}"[:200]] = i
        if i % 10 == 0:
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    memory = {"largest_allocation": largest, "growth": grown, "bounded": max(largest, grown) < LIMIT}
    return {"loaded": 0, "refused": 0, "other errors": 0, **found, **memory, "others": others}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both, print the counts; return 1 if a file broke, an error was unclear or memory unbounded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        # First the kills, while the process is small: they fork it.
        results = {
            "kills": kills(options.kills, Path(folder), console),
            "damaged files": fuzz(options.inputs, Path(folder), options.seed, console),
        }
    console.print_json(data=results)
    timing.write_json(options.json, results)
    hard = not results["kills"].get("broken") and not results["damaged files"]["other errors"]
    return 0 if hard and results["damaged files"]["bounded"] else 1


if __name__ == "__main__":
    sys.exit(main())
