"""Folders as Hugging Face's library reads them: safetensors in shards, their index, `config.json`, a tokenizer."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune._printing import some
from jaxprune.storage import StorageError, _atomic, _writer
from jaxprune.storage._checkpoint import INDEX_ENDING
from jaxprune.storage._container import LONGEST_HEADER

CONFIG = "config.json"
_ONE_OF = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What a tokenizer, and the settings of generation, are made of.
_BESIDE = (
    *_ONE_OF,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`; raise a StorageError where there is none, or no JSON object in it."""
    path = folder / CONFIG
    if not path.is_file():
        raise StorageError(f"{folder} is no folder of a model: it has no {CONFIG}.")
    if path.stat().st_size > LONGEST_HEADER:
        raise StorageError(f"{path} is longer than {LONGEST_HEADER:,} bytes.")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not JSON ({str(error)[:100] or type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise StorageError(f"{path} is not a JSON object.")
    return found


def find_tokenizer(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a tokenizer that a folder has; raise a StorageError where it has none."""
    found = [path for name in _BESIDE if (path := Path(folder) / name).is_file()]
    if not {path.name for path in found} & set(_ONE_OF):
        raise StorageError(f"{folder} has no tokenizer: there is none of {', '.join(_ONE_OF)}.")
    return found


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    chunks: Sequence[_writer.Chunk],
    *,
    beside: Sequence[Path] = (),
    max_shard_bytes: int,
    force: bool,
) -> None:
    """Write a folder that appears whole or not at all; one tensor is in memory at a time.

    Args:
        folder: where; replaced only by `force`, and only where it holds nothing but a model.
        config: for `config.json`.
        chunks: the tensors, in the order of the shards. A chunk is never divided.
        beside: files to copy untouched.
        max_shard_bytes: the most that a shard's tensors take, unless a chunk takes more; more than one get an index.
        force: whether to replace what is there.

    Raises:
        FileExistsError: the folder is there already and not empty, and `force` is False.
        ValueError: it is no folder, or holds more than a model; a number of bytes is not positive.
    """
    _check_target(Path(folder), force)
    shards = _shards(chunks, max_shard_bytes)
    text = json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    with _atomic.replacing_folder(Path(folder)) as made:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            _writer.write(made / name, shard, {"format": "pt"}, compress=False)
            weight_map |= {tensor: name for chunk in shard for tensor in chunk.specs}
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(map(_bytes, chunks))},
                "weight_map": dict(sorted(weight_map.items())),
            }
            _write_bytes(made / ("model" + INDEX_ENDING), json.dumps(index, indent=2).encode() + b"\n")
        for path in beside:
            with open(path, "rb") as source, _atomic.replacing(made / path.name) as target:
                shutil.copyfileobj(source, target)
        _write_bytes(made / CONFIG, text)


def _shards(chunks: Sequence[_writer.Chunk], most: int) -> list[list[_writer.Chunk]]:
    if most < 1:
        raise ValueError(f"max_shard_bytes is {most:,}; a shard takes at least one byte.")
    shards: list[list[_writer.Chunk]] = [[]]
    size = 0
    for chunk in chunks:
        if shards[-1] and size + _bytes(chunk) > most:
            shards.append([])
            size = 0
        shards[-1].append(chunk)
        size += _bytes(chunk)
    return shards


def _bytes(chunk: _writer.Chunk) -> int:
    return sum(spec.size for spec in chunk.specs.values())


def _check_target(folder: Path, force: bool) -> None:
    _atomic.require_new(folder, force)
    if not folder.is_dir():
        return
    others = sorted(path.name for path in folder.iterdir() if not _is_of_model(path))
    if others:
        raise ValueError(f"{folder} holds {some(others)} beside a model, which would go with it; name another folder.")


def _is_of_model(path: Path) -> bool:
    return path.is_file() and (path.name in (CONFIG, *_BESIDE) or path.name.endswith((".safetensors", INDEX_ENDING)))


def _write_bytes(path: Path, data: bytes) -> None:
    with _atomic.replacing(path) as file:
        file.write(data)
