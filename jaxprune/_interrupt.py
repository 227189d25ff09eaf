"""Ctrl-C while the command imports what it needs, which takes seconds: an exit code and no traceback."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130


def _is_command() -> bool:
    """Whether this process was started as ``jaxprune`` or ``python -m jaxprune``, and not as a program that imports it."""
    started, words = sys.argv[0], sys.orig_argv
    return Path(started).stem == "jaxprune" or (started == "-m" and words[words.index("-m") + 1] == "jaxprune")


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # nothing has begun yet


def raise_again() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, now that someone catches it."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
