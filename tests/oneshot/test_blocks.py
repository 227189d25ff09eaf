"""Block by block: against NumPy in float64 written from the paper, and against the whole model layer by layer."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import sites
from jaxprune.oneshot import admm, block_by_block, prune_and_quantize, sequential, sparsegpt
from tests.support import oracles_oneshot as oracles
from tests.support.graph_zoo import normal

WIDTH, INNER = 6, 8
HALF = functools.partial(sparsegpt, k=0.5, mask_block=2)
# Of which no unit loses all its weights, and with them what the next kernel reads.
THIRD = functools.partial(sparsegpt, k=1 / 3, mask_block=2)
BATCHES = [normal(24, WIDTH, salt=i) for i in range(3)]


def block(params: Any, x: jax.Array, bias: Any = 0.0) -> jax.Array:
    """Two kernels that share an input, and one behind them that is stored transposed."""
    h = jnp.tanh(x @ params["left"]["kernel"]) * (x @ params["right"]["kernel"] + bias)
    return x + h @ params["down"]["weight"].T


def weights(salt: int) -> Any:
    return {
        "left": {"kernel": normal(WIDTH, INNER, salt=salt) / 2},
        "right": {"kernel": normal(WIDTH, INNER, salt=salt + 1) / 2},
        "down": {"weight": normal(WIDTH, INNER, salt=salt + 2) / 2},
    }


BLOCKS = [weights(10 * i) for i in range(1, 4)]


def whole(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        x = block(params[i], x)
    return x


def in_numpy(blocks: list[Any], *, dense: bool) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The recipe: each block on what the pruned blocks before it give, its parts one after the other."""
    x = y = np.concatenate(BATCHES).astype(np.float64)
    for params in blocks:
        found = {}

        def prune(name: str, w: np.ndarray, x: np.ndarray, y: np.ndarray, found: Any = found) -> np.ndarray:
            gram = x.T @ x
            if dense:
                damping = 0.01 * np.mean(np.diagonal(gram)) * np.eye(len(gram))
                w = np.linalg.solve(gram + damping, (x.T @ y + damping) @ w)
            choose = oracles.layer(1 / 3, *w.shape)
            found[name] = oracles.sparsegpt(w, oracles.damped(gram, 0.01), choose, 2)
            return found[name][0]

        left, right, down = (
            np.asarray(w, np.float64)
            for w in (params["left"]["kernel"], params["right"]["kernel"], params["down"]["weight"].T)
        )
        h = np.tanh(x @ prune("left", left, x, y)) * (x @ prune("right", right, x, y))
        dense_h = np.tanh(y @ left) * (y @ right)
        x = x + h @ prune("down", down, h, dense_h)
        y = y + dense_h @ down
        yield found


@pytest.mark.parametrize("target", ["current", "dense"])
def test_is_the_published_recipe(target: Any) -> None:
    results = block_by_block(block, BLOCKS, BATCHES, THIRD, target=target)
    for (found, masks), expected in zip(results, in_numpy(BLOCKS, dense=target == "dense"), strict=True):
        for name, leaf, turned in (("left", "kernel", False), ("right", "kernel", False), ("down", "weight", True)):
            w, mask = found[name][leaf], masks[name][leaf]
            np.testing.assert_array_equal(mask.T if turned else mask, expected[name][1])
            np.testing.assert_allclose(w.T if turned else w, expected[name][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["current", "dense"])
def test_equals_the_whole_model_in_sequence(target: Any) -> None:
    method = functools.partial(admm, k=0.5, steps=4)
    params, masks = sequential(whole, BLOCKS, BATCHES, method, target=target)
    found = list(block_by_block(block, BLOCKS, BATCHES, method, target=target))
    for (mine, kept), theirs, also_kept in zip(found, params, masks, strict=True):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), kept, also_kept))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), mine, theirs)


@pytest.mark.slow
def test_a_method_that_rounds_gives_codes_by_block() -> None:
    method = functools.partial(prune_and_quantize, k=1 / 3, bits=4)
    whole_model = sequential(whole, BLOCKS, BATCHES, method, target="current")
    for number, found in enumerate(block_by_block(block, BLOCKS, BATCHES, method, target="current")):
        assert found.codes.keys() == {"left/kernel", "right/kernel", "down/weight"}
        for path, codes in found.codes.items():
            np.testing.assert_array_equal(codes.codes, whole_model.codes[f"{number}/{path}"].codes)


def test_activations_on_disk_change_nothing_and_leave_nothing(tmp_path: Path) -> None:
    batches = [batch.astype(jnp.bfloat16) for batch in BATCHES]

    def narrow(params: Any, x: jax.Array) -> jax.Array:
        return block(params, x.astype(jnp.float32)).astype(jnp.bfloat16)

    in_memory = list(block_by_block(narrow, BLOCKS, batches, HALF))
    walk = block_by_block(narrow, BLOCKS, batches, HALF, folder=tmp_path)
    on_disk = [next(walk)]
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(file.stat().st_size for file in kept) == [2 * 24 * WIDTH] * 6  # bfloat16, three batches, two streams
    on_disk += walk
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), in_memory, on_disk))
    assert not list(tmp_path.iterdir())


def test_blocks_are_asked_for_one_at_a_time_and_compiled_once() -> None:
    traced, asked = [], []

    def counted(params: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
        traced.append(params)
        return block(params, x, scale)

    def blocks() -> Iterator[Any]:
        for number, params in enumerate(BLOCKS):
            asked.append(number)
            yield params

    walk = block_by_block(counted, blocks(), [(batch, jnp.float32(0.1)) for batch in BATCHES], HALF)
    assert not asked
    next(walk)
    assert asked == [0]
    before = len(traced)
    next(walk)  # the first one whose inputs are not those of the dense model
    compiled = []

    def note(event: str, seconds: float, **_: Any) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert len(list(walk)) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert before == len(traced)
    assert not compiled


def test_prunes_what_multiplies_data_also_in_loops() -> None:
    def looped(params: Any, x: jax.Array) -> jax.Array:
        x = lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ params["cell"]), x)
        return x + x @ params["last"] + params["bias"][None]

    params = {"cell": normal(WIDTH, WIDTH) / 2, "last": normal(WIDTH, WIDTH) / 2, "bias": normal(WIDTH)}
    for pruned, masks in block_by_block(looped, [params] * 2, BATCHES, HALF):
        assert {name: float(mask.mean()) for name, mask in masks.items()} == {"cell": 0.5, "last": 0.5, "bias": 1.0}
        assert jax.tree.all(jax.tree.map(lambda w, mask: bool((w[~mask] == 0).all()), pruned, masks))
    only = list(block_by_block(looped, [params], BATCHES, HALF, prunable="last"))
    assert [bool(mask.all()) for mask in only[0][1].values()] == [True, True, False]


def test_what_is_not_understood_is_told_and_stays() -> None:
    def sorted_kernel(params: Any, x: jax.Array) -> jax.Array:
        return x + x @ params["plain"] + x @ jnp.sort(params["sorted"], axis=0)

    params = {"plain": normal(WIDTH, WIDTH) / 2, "sorted": normal(WIDTH, WIDTH) / 2}
    with pytest.warns(sites.CalibrationWarning, match=r"params\['sorted'\]"):
        ((_, masks),) = block_by_block(sorted_kernel, [params], BATCHES, HALF)
    assert [float(masks[name].mean()) for name in ("plain", "sorted")] == [0.5, 1.0]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match='block_by_block takes target="dense" or "current"'):
        block_by_block(block, BLOCKS, BATCHES, HALF, target="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no calibration batch"):
        next(block_by_block(block, BLOCKS, [], HALF))
    with pytest.raises(ValueError, match=r"batches\[1\]\[0\] is float32\[4, 6\]"):
        next(block_by_block(block, BLOCKS, [BATCHES[0], normal(4, WIDTH)], HALF))
    wide = {"kernel": normal(WIDTH, 4)}
    with pytest.raises(ValueError, match=r"fn returns float32\[24, 4\] where hidden is float32\[24, 6\]") as raised:
        next(block_by_block(lambda p, x: x @ p["kernel"], [wide], BATCHES, HALF))
    assert raised.value.__notes__ == ["This is about block 0."]
    walk = block_by_block(lambda p, x: block(p, x) * 1e10, BLOCKS, BATCHES, HALF, target="current")
    next(walk)
    with pytest.raises(ValueError, match=r"activations that meet params\['left'\]\['kernel'\]") as raised:
        list(walk)
    assert raised.value.__notes__ == ["This is about block 2."]
    assert not list(walk)
