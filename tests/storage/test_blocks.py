"""A model on disk pruned block by block: what the same in memory gives, and nothing else touched."""

import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxprune import load_sparse, oneshot, rules, save_sparse, storage
from tests.support.graph_zoo import normal

WIDTH, INNER, BLOCKS = 6, 8, 3
NAMES = {
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.layers.{}.norm.weight",
}
HALF = functools.partial(oneshot.sparsegpt, k=0.5)


def block(params: Any, x: jax.Array) -> jax.Array:
    """Kernels as PyTorch has them, [outputs, inputs]."""
    h = (x * params["norm"][None].astype(x.dtype)).astype(params["up"].dtype)
    return x + (jnp.tanh(h @ params["up"].T) @ params["down"].T).astype(x.dtype)


DATA = [normal(24, WIDTH, salt=i) for i in range(2)]


def walk(blocks: Iterator[Any]) -> Iterator[Any]:
    return oneshot.block_by_block(block, blocks, DATA, HALF)


def model(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER), "norm": (WIDTH,)}
    found = {
        NAMES[name].replace("{}", str(i)): np.asarray(normal(*shapes[name], salt=10 * i + 1)).astype(dtype)
        for i in range(BLOCKS)
        for name in NAMES
    }
    return found | {"model.embed_tokens.weight": np.asarray(normal(16, WIDTH)).astype(dtype)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of which none holds just one block, and their index."""
    return write(tmp_path / "source", model())


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        of_shard = {name: tensors[name] for name in names if weight_map[name] == shard}
        safetensors.numpy.save_file(of_shard, path / shard, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def merged(folder: Path) -> dict[str, np.ndarray]:
    return functools.reduce(operator.or_, map(safetensors.numpy.load_file, sorted(folder.glob("*.safetensors"))))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_folder_is_pruned_as_the_same_blocks_in_memory(tmp_path: Path, dtype: Any) -> None:
    tensors = model(dtype)
    source = write(tmp_path / "source", tensors)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    read: list[int] = []
    saved = storage.prune_blocks(source, tmp_path / "deep" / "pruned", NAMES, walk, dense=True, done=read.append)
    assert read == [0, 1, 2]
    blocks = [jax.tree.map(lambda name, i=i: tensors[name.replace("{}", str(i))], NAMES) for i in range(BLOCKS)]
    found = merged(saved.path)
    assert {path.name for path in saved.path.iterdir()} == set(before)
    for i, (params, masks) in enumerate(walk(iter(blocks))):
        for name, pattern in NAMES.items():
            stored = found.pop(pattern.replace("{}", str(i)))
            assert stored.dtype == dtype
            np.testing.assert_array_equal(stored, params[name])
            if name != "norm":
                assert (stored != 0).sum() == masks[name].sum() == INNER * WIDTH // 2
    np.testing.assert_array_equal(found.pop("model.embed_tokens.weight"), tensors["model.embed_tokens.weight"])
    assert not found
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pruned"]


def test_masks_are_stored_and_add_up(tmp_path: Path) -> None:
    safetensors.numpy.save_file(model(), tmp_path / "source")
    storage.prune_blocks(tmp_path / "source", tmp_path / "half", NAMES, walk)
    masks = load_sparse(tmp_path / "half")[1]
    name = NAMES["up"].replace("{}", "1")
    assert {path: float(mask.mean()) for path, mask in masks.items() if not mask.all()} == {
        NAMES[name].replace("{}", str(i)): 0.5 for name in ("up", "down") for i in range(BLOCKS)
    }

    def again(blocks: Iterator[Any]) -> Iterator[Any]:
        for params in blocks:
            yield params, jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 2 == 0, params)

    storage.prune_blocks(tmp_path / "half", tmp_path / "less", NAMES, again)
    less = load_sparse(tmp_path / "less")[1]
    even = np.arange(masks[name].size).reshape(masks[name].shape) % 2 == 0
    np.testing.assert_array_equal(less[name], masks[name] & even)


@pytest.mark.slow
def test_codes_are_stored_as_they_are_and_stay(folder: Path, tmp_path: Path) -> None:
    method = functools.partial(oneshot.prune_and_quantize, k=0.5, bits=3, symmetric=False)

    def rounded(blocks: Iterator[Any]) -> Iterator[Any]:
        return oneshot.block_by_block(block, blocks, DATA, method)

    storage.prune_blocks(folder, tmp_path / "int3", NAMES, rounded)
    codes = storage.load_codes(tmp_path / "int3")
    tensors = model()
    blocks = [jax.tree.map(lambda name, i=i: tensors[name.replace("{}", str(i))], NAMES) for i in range(BLOCKS)]
    for i, found in enumerate(rounded(iter(blocks))):
        for path, expected in found.codes.items():
            stored = codes.pop(NAMES[path].replace("{}", str(i)))
            for mine, theirs in zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(mine, theirs)
            assert stored.bits == 3
    assert not codes
    # They outlive a conversion that asks for nothing else, and more pruning, which takes them to the code of zero.
    storage.convert_file(tmp_path / "int3", tmp_path / "copy")
    pruned = storage.prune_file(tmp_path / "int3", tmp_path / "less", 0.75, rule=rules.layer_sparsity)
    assert not any(row.largest_error for row in pruned.tensors)  # what is pruned is no error of rounding
    once, twice = storage.load_codes(tmp_path / "copy"), storage.load_codes(tmp_path / "less")
    for name, codes_of_one in storage.load_codes(tmp_path / "int3").items():
        np.testing.assert_array_equal(codes_of_one.codes, once[name].codes)
        moved = np.asarray(twice[name].codes != codes_of_one.codes)
        assert (np.asarray(twice[name].values())[moved] == 0).all()
        assert (np.asarray(twice[name].values()) != 0).sum() <= INNER * WIDTH // 4
        assert twice[name].bits == 3


def test_bad_input_leaves_everything_as_it_was(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, names: Any = NAMES, prune: Any = walk, source: Path = folder, target: str = "out") -> None:
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=match):
            storage.prune_blocks(source, tmp_path / target, names, prune)
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before

    refused("is read to write it; name another output", target="source")
    refused(r"names\['up'\] is 'up', not the name of a tensor with {}", {"up": "up"})
    refused("has a name twice", {"a": NAMES["up"], "b": NAMES["up"]})
    refused("there is no tensor 'layers.0.w', which names asks for; one is named 'model.embed", {"w": "layers.{}.w"})
    tensors = model()
    del tensors["model.layers.1.norm.weight"]
    hole = write(tmp_path / "hole", tensors)
    refused("block 1 has no tensor 'model.layers.1.norm.weight'", source=hole)
    refused("no tensor 'model.layers.1.norm.weight' of block 1, although there is", {"n": NAMES["norm"]}, source=hole)
    whole = jnp.ones((INNER, WIDTH), bool)
    with_mask = {"up": whole, "down": whole.T, "norm": whole[0]}
    refused("prune returned 1 of 3 blocks", prune=lambda blocks: [(next(blocks), with_mask)])
    refused(
        r"prune returned float16\[6, 8\] for tensor 'model.layers.0.mlp.down_proj.weight', which is float32\[6, 8\]",
        prune=lambda blocks: ((jax.tree.map(np.float16, params), with_mask) for params in blocks),
    )
    refused("masks has no entry for names", prune=lambda blocks: ((params, {}) for params in blocks))
    refused("no calibration batch", prune=lambda blocks: oneshot.block_by_block(block, blocks, [], HALF))
    refused(
        r"fn returns float32\[24, 8\] where hidden is float32\[24, 6\]",
        prune=lambda blocks: oneshot.block_by_block(lambda p, x: x @ p["up"].T, blocks, DATA, HALF),
    )


def test_what_is_there_is_replaced_only_when_asked(folder: Path, tmp_path: Path) -> None:
    first = storage.prune_blocks(folder, tmp_path / "out", NAMES, walk)
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    read = []
    with pytest.raises(FileExistsError, match="out is there already; force=True replaces it"):
        storage.prune_blocks(folder, tmp_path / "out", NAMES, lambda blocks: read.append(blocks) or walk(blocks))
    assert not read  # before any work
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before
    assert storage.prune_blocks(folder, tmp_path / "out", NAMES, walk, force=True).bytes == first.bytes


def test_a_stop_while_pruning_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    save_sparse(tmp_path / "other", {"w": jnp.ones((2, 2))})
    here = tmp_path / "activations"
    here.mkdir()
    before = sorted(tmp_path.rglob("*"))

    def stop(number: int) -> None:
        assert list(here.iterdir())
        if number == 1:
            raise KeyboardInterrupt

    def on_disk(blocks: Iterator[Any]) -> Iterator[Any]:
        return oneshot.block_by_block(block, blocks, DATA, HALF, folder=here)

    with pytest.raises(KeyboardInterrupt) as raised:
        storage.prune_blocks(folder, tmp_path / "out", NAMES, on_disk, done=stop)
    assert raised.tb is not None  # which holds the frames
    assert sorted(tmp_path.rglob("*")) == before
