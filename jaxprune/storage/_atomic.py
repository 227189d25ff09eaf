"""Files that appear whole or not at all."""

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    Whatever stops the process, `path` holds the old content or the new one: the data reach the disk before the name
    does. The new file has the old one's permissions and, where this process may give them, its owner and group.

    An exception leaves no temporary file behind, nor does SIGTERM or SIGHUP in the main thread, where the program handles
    them in no way of its own. SIGKILL may leave ``.<name>.<random>.tmp``.

    Raises:
        ValueError: `path` is there and no file, see `require_file`.
    """
    require_file(path)
    target = Path(os.path.realpath(path))  # what a symbolic link points at is replaced, not the link
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)

    def forget() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)

    try:
        with _before_termination(forget):
            os.close(descriptor)
            with open(name, "wb") as file:
                _adopt(file.fileno(), target)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
    except BaseException:
        forget()
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside `path`, to be filled by `replacing`, that takes its place when the block ends well.

    What is there already goes, whole, once the new folder is complete: check first that nothing else lies in it. As with
    `replacing`, an exception, SIGTERM or SIGHUP leave nothing behind; SIGKILL may leave ``.<name>.<random>.tmp``.

    Raises:
        ValueError: `path` is there and no folder.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"{path} is {_kind(path.stat().st_mode)}, which is not replaced by a folder; name another output."
        )
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = made / "old"

    def forget() -> None:
        shutil.rmtree(made, ignore_errors=True)

    try:
        with _before_termination(forget):
            new = made / "new"
            new.mkdir()
            yield new
            _sync_folder(new)
            if target.is_dir():
                os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                if old.is_dir():
                    os.rename(old, target)
                raise
            _sync_folder(target.parent)
    finally:
        forget()


def require_file(path: Path) -> None:
    """Raise a ValueError where a file would take the place of something else: a device, a pipe, a socket, a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {_kind(mode)}, which is not replaced by a file; name another output.")


def require_new(path: Path, force: bool) -> None:
    """Raise a FileExistsError where a file, or a folder that holds something, would be replaced and nobody said that it may be."""
    if not force and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise FileExistsError(f"{path} is there already; force=True replaces it.")


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "a file"
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _adopt(descriptor: int, target: Path) -> None:
    """Give a new file the owner, group and permissions of the one that it replaces, or those of any new file."""
    try:
        old = target.stat()
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(descriptor, 0o666 & ~umask)
        return
    for owner, group in ((-1, old.st_gid), (old.st_uid, -1)):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, owner, group)
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))  # last: a change of owner clears some of them


@contextlib.contextmanager
def _before_termination(clean: Callable[[], None]) -> Iterator[None]:
    """Call `clean` before SIGTERM or SIGHUP end the process in this block, unless the program handles or ignores them."""

    def end(number: int, frame: FrameType | None) -> None:
        clean()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        yield
        return
    unhandled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
