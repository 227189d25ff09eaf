"""What each command of ``jaxprune`` does; returns False only where models differ."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxprune import rules
from jaxprune._printing import as_json, in_order
from jaxprune._tables import Table
from jaxprune._tree._names import slashed
from jaxprune._tree._prunable import Predicate, is_kernel
from jaxprune.storage import _files
from jaxprune.storage._atomic import require_file, require_new
from jaxprune.storage._checkpoint import Checkpoint, Writing
from jaxprune.storage._overview import diff_files, summarize_file

# What each rule's k is; one that is made by its m takes --m as well.
RULES = {name: rule.strength for name, rule in vars(rules).items() if isinstance(rule, rules.Rule)}
RULES["n_m"] = "how many of every --m weights are kept"

# Columns of a file or a pipe, which has no width of its own.
_ENDLESS = 100_000


def summarize(options: argparse.Namespace) -> bool:
    """Show what a model holds."""
    with _bar("reading", _count(options.model)) as advance:
        found = summarize_file(options.model, done=lambda name: advance())
    if options.json:
        _print_json(found.to_dict())
    else:
        _show(found.table(full=options.full))
        print(f"{found.dense_bytes / max(found.bytes, 1):.2f} times smaller than its dense arrays")
    return True


def prune(options: argparse.Namespace) -> bool:
    """Prune a model and write it."""
    rule = _rule_of(options)
    with Checkpoint(options.model) as checkpoint:
        _check_target(options, checkpoint)
        names = _files.choose_tensors(checkpoint, _prunable(options, checkpoint))
        mask_of = _files.masks_by(rule, options.k, checkpoint, names)
        k = f"{options.k:g}" if options.m is None else f"{options.k:g} of {options.m}"
        metadata = {"jaxprune.rule": options.rule, "jaxprune.k": k}
        return _write(options, checkpoint, mask_of, metadata, set(names))


def convert(options: argparse.Namespace) -> bool:
    """Write a model in another way."""
    with Checkpoint(options.model) as checkpoint:
        _check_target(options, checkpoint)
        prunable = {name for name, tensor in checkpoint.tensors.items() if _files.counts(tensor)}
        return _write(options, checkpoint, _files.stored_or_paying, {}, prunable)


def diff(options: argparse.Namespace) -> bool:
    """Compare two models."""
    with _bar("comparing", _count(options.a)) as advance:
        found = diff_files(options.a, options.b, done=lambda name: advance())
    if options.json:
        _print_json([dataclasses.asdict(difference) for difference in found])
    elif found:
        table = Table(full=options.full, title=f"{options.a} and {options.b}", title_justify="left")
        table.add_column("tensor", overflow="fold")
        table.add_column("difference")
        table.add_column("largest", justify="right")
        for difference in in_order(found, lambda difference: difference.name):
            table.add_row(difference.name, difference.what, f"{difference.largest:.4g}")
        _show(table)
    else:
        print("no differences")
    return not found


def report(options: argparse.Namespace) -> bool:
    """Write a page about a model; unlike the others, this holds the whole model in memory."""
    from jaxprune._report._write import report as write_page

    page = Path(options.out)
    params, masks, counted = {}, {}, set()
    with Checkpoint(options.model) as checkpoint:
        require_file(page)
        checkpoint.require_apart(page)
        require_new(page, options.force)
        _require_parent(page)
        for name, tensor in checkpoint.tensors.items():
            values, mask = tensor.load()
            mask = mask if tensor.encoded else _files.nonzero(tensor, values)
            if _files.counts(tensor):
                counted.add(slashed(name))
            params[name], masks[name] = values, np.ones(values.shape, bool) if mask is None else mask
    write_page(
        page, params, masks, title=Path(options.model).name, prunable=lambda path, leaf: slashed(path) in counted
    )
    return True


def _write(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    mask_of: _files.MaskOf,
    metadata: dict[str, str],
    prunable: set[str],
) -> bool:
    rounds = 1 if options.dry_run else 2
    with _bar("writing", rounds * len(checkpoint.tensors)) as advance:
        planned = _files.plan_file(
            checkpoint,
            mask_of,
            dense=options.dense,
            quantize=options.quantize,
            quantize_tables=options.quantize_tables,
            group_size=options.group_size,
            dtype=options.dtype,
            compress=options.compress,
            metadata=metadata,
            done=lambda name: advance(),
        )
        size = None if options.dry_run else planned.write(Path(options.out)).bytes
    figures = _figures(options, planned, size, prunable)
    if options.json:
        _print_json(figures)
    else:
        _print_figures(figures, options.full)
        print(_reading(figures["layout"], options.compress, folder=planned.index is not None))
    return True


def _figures(options: argparse.Namespace, planned: Writing, size: int | None, prunable: set[str]) -> dict[str, Any]:
    """Gather what was written, or would be; the bytes of a dry run are those of the tensors, before zstd."""
    rows = planned.rows
    counted = [row for row in rows if row.path in prunable and row.kept <= row.size]
    weights, kept = sum(row.size for row in rows), sum(row.kept for row in rows)
    pruned_size, pruned_kept = sum(row.size for row in counted), sum(row.kept for row in counted)
    stored = sum(row.stored_bytes for row in rows) if size is None else size
    return {
        "path": options.out,
        "written": size is not None,
        "layout": _layout(planned),
        "bytes": stored,
        "dense_bytes": sum(row.dense_bytes for row in rows),
        "compression": sum(row.dense_bytes for row in rows) / max(stored, 1),
        "sparsity": 1 - kept / weights if weights else 0.0,
        "prunable_sparsity": 1 - pruned_kept / pruned_size if pruned_size else 0.0,
        "tensors": [row.to_dict() for row in rows],
    }


def _print_figures(figures: dict[str, Any], full: bool) -> None:
    table = Table(full=full, title=figures["path"], title_justify="left")
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "kept", "sparsity", "bytes", "error"):
        table.add_column(column, justify="right")
    for row in in_order(figures["tensors"], lambda row: row["path"]):
        share = f"{1 - row['kept'] / row['size']:.2%}" if row["kept"] < row["size"] else ""
        error = f"{row['relative_error']:.2%}" if row["relative_error"] else ""
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["path"], shape, f"{row['kept']:,}", share, f"{row['stored_bytes']:,}", error)
    _show(table)
    verb = "wrote" if figures["written"] else "would write, before compression,"
    print(
        f"{verb} {figures['bytes']:,} bytes, {figures['compression']:.2f} times smaller than dense; "
        f"{figures['prunable_sparsity']:.2%} of the prunable weights pruned, {figures['sparsity']:.2%} of all"
    )


def _layout(planned: Writing) -> str:
    if any(row.bits < 8 * np.dtype(row.dtype).itemsize for row in planned.rows):
        return "integers"
    return "plain" if all(row.path in planned.weight_map for row in planned.rows) else "sparse-bitmask"


def _reading(layout: str, zstd: bool, *, folder: bool) -> str:
    """Say which layout a model was written in, who reads it, and what to do for others."""
    ours = "jaxprune.load_sparse reads " + ("each file of it" if folder else "it")
    if layout == "plain":
        return (
            f"plain safetensors through zstd: {ours}, others after zstd -d"
            if zstd
            else "plain safetensors for any reader"
        )
    if layout == "integers":
        return f"integers and their scales: {ours}; for others, jaxprune convert it with --dense"
    others = "" if zstd else ", compressed-tensors up to 0.14 too"
    layout = "layout sparse-bitmask, kept weights and a bit for every weight"
    return f"{layout}: {ours}{others}; --dense writes a plain one for others"


def _rule_of(options: argparse.Namespace) -> rules.Rule:
    if (options.rule == "n_m") != (options.m is not None):
        raise ValueError("--m says how many weights make a group of --rule n_m; give both or neither.")
    return rules.n_m(options.m) if options.rule == "n_m" else getattr(rules, options.rule)


def _prunable(options: argparse.Namespace, checkpoint: Checkpoint) -> Predicate:
    given = [*(options.only or []), *options.skip]
    only, skip = ([slashed(glob) for glob in globs or []] for globs in (options.only, options.skip))
    paths = [slashed(name) for name in checkpoint.tensors]
    for glob in given:
        if not any(fnmatchcase(path, slashed(glob)) for path in paths):
            raise ValueError(f"no tensor is named like {glob!r}; jaxprune summarize --full lists the names.")

    def fits(path: str, leaf: Any) -> bool:
        wanted = any(fnmatchcase(path, glob) for glob in only) if only else is_kernel(path, leaf)
        return wanted and not any(fnmatchcase(path, glob) for glob in skip)

    return fits


def _check_target(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    if (options.quantize or options.quantize_tables) and options.dense:
        raise ValueError("--quantize and --quantize-tables store integers and --dense does not; choose one.")
    target, folder = Path(options.out), Path(options.model).is_dir()
    if target.exists() and target.is_dir() != folder:
        kinds = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"{options.out} is a {kinds[1]}, but {options.model} is a {kinds[0]}; name another output.")
    if not options.dry_run:
        checkpoint.check_target(target, options.force)
        _require_parent(target)


def _require_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} is not there; make it first.")


def _count(path: str) -> int:
    with Checkpoint(path) as checkpoint:
        return len(checkpoint.tensors)


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress on the standard error while it is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:  # where releases of rich print an empty line
        yield lambda: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the caller: rich would exit with the code that means a difference."""
        raise


def _show(table: Table) -> None:
    """Print a table; in a file or a pipe no name is broken, where a program may look for it."""
    width = None
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = table.widen(int(columns)) if columns.isdigit() else _ENDLESS
    _Console(highlight=False, width=width).print(table)


def _print_json(value: Any) -> None:
    print(as_json(value))
