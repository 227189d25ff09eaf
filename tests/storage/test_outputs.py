"""What is written over, and what is not: devices, pipes, the source itself; owners, signals, a source that changes."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage
from jaxprune._cli._parser import main
from jaxprune.storage import StorageError
from jaxprune.storage._atomic import replacing
from jaxprune.storage._checkpoint import Checkpoint
from tests.support.slow import slow_but
from tests.support.storage_models import W

PRUNE = ("--rule", "layer_sparsity", "--k", "0.5")
COMMANDS = {"prune": PRUNE, "convert": ("--dense",), "report": ()}


@pytest.fixture
def model(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    flat = {f"layer.{i}.weight": rng.standard_normal((8, 16), np.float32) for i in range(2)}
    safetensors.numpy.save_file(flat, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards without an index."""
    (tmp_path / "folder").mkdir()
    for i in range(2):
        save_sparse(tmp_path / "folder" / f"{i}.safetensors", {f"layer{i}": {"kernel": W}})
    return tmp_path / "folder"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def holding(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.is_file()}


# Devices and pipes


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a link to a device", "a folder"])
def test_what_is_no_file_is_never_replaced(kind, model, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "a pipe":
        os.mkfifo(out)
    elif kind == "a folder":
        out.mkdir()
    elif kind == "a link to a device":
        out.symlink_to("/dev/null")
    else:
        try:
            os.mknod(out, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # another /dev/null
        except PermissionError:
            out = Path("/dev/null")
    before = out.stat()
    masks = {"w": W > 0}
    for write in (
        lambda: save_sparse(out, {"w": W}, force=True),
        lambda: storage.prune_file(model, out, 0.5, rule=rules.layer_sparsity, force=True),
        lambda: storage.convert_file(model, out, force=True),
        lambda: jaxprune.report(out, {"w": W}, masks, prunable=lambda path, leaf: True),
    ):
        with pytest.raises(ValueError, match=rf"{out} is {kind.removeprefix('a link to ')}, which is not replaced"):
            write()
    for command, options in COMMANDS.items():
        for force in ((), ("--force",)):
            assert run(command, model, out, *options, *force) == 2
            assert str(out) in capsys.readouterr().err
    assert os.path.samestat(out.stat(), before)
    assert stat.S_IFMT(out.stat().st_mode) == stat.S_IFMT(before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["model", "out"] if out.parent == tmp_path else ["model"]
    )


def test_a_shard_that_is_a_pipe_is_never_replaced(folder, tmp_path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "1.safetensors")
    assert run("prune", folder, tmp_path / "out", *PRUNE, "--force") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.safetensors"]


def test_a_dry_run_may_name_anything(model, capsys):
    assert run("prune", model, "/dev/null", *PRUNE, "--dry-run") == 0
    assert run("prune", model, model, *PRUNE, "--dry-run") == 0


# The source itself


def names_of(path: Path) -> list[Path]:
    """The same file or folder by a symbolic link, a hard link and two spellings."""
    soft, hard = path.with_name("soft"), path.with_name("hard")
    soft.symlink_to(path)
    if path.is_file():
        os.link(path, hard)
    else:
        hard.mkdir()
        for entry in path.iterdir():
            os.link(entry, hard / entry.name)
    return [path, soft, hard, path.parent / "." / path.name, path.parent / "folder" / ".." / path.name]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_replaces_the_file_that_it_reads(command, model, folder, capsys):
    before = model.read_bytes()
    for name in names_of(model):
        assert run(command, model, name, *COMMANDS[command], "--force") == 2
        assert "itself" in capsys.readouterr().err
        assert run(command, name, model, *COMMANDS[command], "--force") == 2
    assert model.read_bytes() == before
    with pytest.raises(ValueError, match="itself"):
        storage.convert_file(model, model, force=True)
    with pytest.raises(ValueError, match="itself"):
        storage.prune_file(model, model, 0.5, rule=rules.layer_sparsity, force=True)


def test_no_command_replaces_the_folder_that_it_reads(folder, tmp_path, capsys):
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"layer0/kernel": "0.safetensors", "layer1/kernel": "1.safetensors"}}'
    )
    before = holding(folder)
    for name in names_of(folder):
        for command in ("prune", "convert"):
            assert run(command, folder, name, *COMMANDS[command], "--force") == 2
            assert "itself" in capsys.readouterr().err
    for entry in before:
        assert run("report", folder, folder / entry, "--force") == 2
        assert "itself" in capsys.readouterr().err
    # The index alone.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors.index.json").symlink_to(folder / "model.safetensors.index.json")
    assert run("prune", folder, tmp_path / "out", *PRUNE, "--force") == 2
    assert holding(folder) == before


# Owner, group and mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_that_is_replaced_keeps_owner_group_and_mode(model, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(b"")
    os.chown(out, 12_345, 23_456)
    out.chmod(0o640)
    assert run("prune", model, out, *PRUNE, "--force") == 0
    found = out.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12_345, 23_456, 0o640)
    save_sparse(out, {"w": W}, force=True)
    assert (out.stat().st_uid, out.stat().st_gid) == (12_345, 23_456)


# Signals


STOPPED = """
import os, signal, sys
from pathlib import Path
from jaxprune.storage import _atomic
number = int(sys.argv[2])
if sys.argv[3] == "default":  # a child of nohup, or of what runs in the background, has some ignored
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
elif sys.argv[3] == "ignored":
    signal.signal(number, signal.SIG_IGN)
elif sys.argv[3] == "handled":
    signal.signal(number, lambda *_: sys.exit(7))
with _atomic.replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), number)
assert signal.getsignal(number) is (signal.SIG_IGN if sys.argv[3] == "ignored" else signal.SIG_DFL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", slow_but([signal.SIGTERM], [signal.SIGHUP, signal.SIGINT]))
@pytest.mark.parametrize(("held", "code"), [("default", None), ("handled", 7), ("ignored", 0)])
def test_a_signal_leaves_no_temporary(number, held, code, tmp_path):
    out = tmp_path / "out"
    out.write_bytes(b"old")
    command = [sys.executable, "-c", STOPPED, str(out), str(int(number)), held]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (-number if code is None else code), done.stderr
    assert holding(tmp_path) == {"out": b"half" if held == "ignored" else b"old"}


STOPPED_FOLDER = """
import os, signal, sys
from pathlib import Path
from jaxprune.storage import _atomic
with _atomic.replacing_folder(Path(sys.argv[1])) as folder:
    with _atomic.replacing(folder / "one") as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
def test_a_signal_leaves_no_temporary_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", STOPPED_FOLDER, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert holding(tmp_path / "out") == {"one": b"old"}


def test_another_thread_writes_too(tmp_path):
    import threading

    def write() -> None:
        with replacing(tmp_path / "out") as file:
            file.write(b"new")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert holding(tmp_path) == {"out": b"new"}


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "jaxprune"], [str(Path(sys.executable).with_name("jaxprune"))]])
def test_ctrl_c_while_importing_is_no_traceback(command, tmp_path):
    # As if it came while optax is imported.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background has it ignored
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'optax':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# A source that changes


def rewrite(path: Path) -> None:
    """Write a file anew, to the same length and without a change of name."""
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"\0\0\0\0")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))  # clocks may be coarse


@pytest.mark.parametrize("compress", [False, True])
def test_a_source_rewritten_while_it_is_read_is_noticed(compress, model, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    storage.convert_file(model, source, compress=compress, force=True)
    out.write_bytes(b"old")
    turns = []

    def done(name: str) -> None:
        turns.append(name)
        if len(turns) == 4:  # the second time of the last tensor
            rewrite(source)

    for write in (
        lambda: storage.prune_file(source, out, 0.5, rule=rules.layer_sparsity, done=done, force=True),
        lambda: storage.convert_file(source, out, compress=True, done=done, force=True),
    ):
        turns.clear()
        with pytest.raises(StorageError, match=f"{source}: has changed while it was read"):
            write()
        assert out.read_bytes() == b"old"
        storage.convert_file(model, tmp_path / "anew", compress=compress, force=True)
        os.replace(tmp_path / "anew", source)
    assert sorted(holding(tmp_path)) == ["model", "out", "source"]


def test_every_reader_notices(model, tmp_path):
    other = tmp_path / "other"
    storage.convert_file(model, other)
    with pytest.raises(StorageError, match="has changed"):
        storage.summarize_file(model, done=lambda name: rewrite(model))
    with pytest.raises(StorageError, match="has changed"):
        storage.diff_files(model, other, done=lambda name: rewrite(other))
    with pytest.raises(StorageError, match="has changed"), Checkpoint(model):
        rewrite(model)


def test_a_source_that_another_takes_the_place_of_is_read_to_its_end(model, tmp_path):
    kept = load_sparse(model)[0]

    def replace(name: str) -> None:
        save_sparse(model, {"other": W}, force=True)

    storage.convert_file(model, tmp_path / "out", done=replace)
    assert sorted(load_sparse(tmp_path / "out")[0]) == sorted(kept)
