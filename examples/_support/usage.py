"""What a piece of work takes: CPU time, the most memory that the process held meanwhile, and how fast it can be."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass
class Usage:
    """CPU seconds (of all threads) and peak memory in bytes, known when the work is done."""

    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@contextlib.contextmanager
def measured() -> Iterator[Usage]:
    """Measure what is done inside; the peak is that of the whole process so far where the system cannot forget one."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not held by this work
    with contextlib.suppress(OSError):  # on Linux alone
        Path("/proc/self/clear_refs").write_text("5")
    used, before = Usage(), _cpu_seconds()
    try:
        yield used
    finally:
        used.cpu_seconds, used.peak_bytes = _cpu_seconds() - before, _peak_bytes()


def fastest(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the seconds of the fastest of some runs by the clock, after one that compiles."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _peak_bytes() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
