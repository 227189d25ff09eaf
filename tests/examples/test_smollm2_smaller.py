"""The example that makes a language model smaller: each stage by value, and a run that goes on behind any of them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
import smollm2_smaller
from _support import distilling, llama
from _support.options import UsageError

import jaxprune
from jaxprune import structured

OPTIONS = [
    "--small",
    "--length",
    "64",
    "--windows",
    "16",
    "--calibration",
    "64",
    "--steps",
    "60",
    "--learning-rate",
    "5e-3",
]
STAGES = ["dense", "fewer layers", "cut", "repaired", "distilled"]
OF_THE_MOMENT = {"prefill", "decode", "cpu_seconds", "peak_bytes"}


@pytest.fixture(autouse=True)
def _trained_once(monkeypatch):
    monkeypatch.setattr(smollm2_smaller, "train_small", train_small)


@functools.cache
def train_small(*, scan):
    """The small model, trained once for all runs: in a scan the same layers."""
    if not scan:
        return smollm2.train_small(scan=False)
    model = train_small(scan=False)
    return model._replace(network=llama.Llama(smollm2.SMALL, scan=True), params=llama.stack(model.params))


def rows(folder):
    """The rows of a run, without what differs from run to run."""
    found = json.loads((folder / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in OF_THE_MOMENT} for row in found]


def test_a_smaller_llama_is_recovered_from_its_parameters():
    config = smollm2.SMALL._replace(layers=3, heads=6, kv_heads=3, inner=40)
    shapes = lambda config: jax.eval_shape(  # noqa: E731
        llama.Llama(config, scan=True).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    model = smollm2.Model(llama.Llama(config, scan=True), shapes(config), None)
    wanted = config._replace(layers=2, heads=4, kv_heads=2, inner=24)
    assert smollm2_smaller.smaller(model, shapes(wanted)).network == llama.Llama(wanted, scan=True)


@pytest.mark.slow
def test_a_small_run_gets_smaller_stage_by_stage_and_goes_on(tmp_path, capsys):
    options = [*OPTIONS, "--out", str(tmp_path)]
    smollm2_smaller.run(options)
    found = rows(tmp_path)
    assert [row["name"] for row in found] == STAGES
    bits = {row["name"]: row["bits_per_byte"] for row in found}
    assert bits["dense"] < bits["distilled"] < bits["repaired"] < bits["cut"] < 8
    assert [row["sizes"] for row in found] == [
        {"layers": 2, "heads": 4, "kv_heads": 2, "inner": 64},
        {"layers": 1, "heads": 4, "kv_heads": 2, "inner": 64},
        *[{"layers": 1, "heads": 2, "kv_heads": 1, "inner": 48}] * 3,
    ]
    # A table of 256 x 32 and norms of 32 features; q and o of 32 x 8 a head, k and v, three matrices of 32 x inner.
    by_hand = [
        256 * 32 + 32 + layers * (2 * 32 + 2 * 32 * 8 * (heads + kv_heads) + 3 * 32 * inner)
        for layers, heads, kv_heads, inner in (row["sizes"].values() for row in found)
    ]
    assert [row["parameters"] for row in found] == by_hand
    # Of a token: every weight but the norms' once, the table as the head, and 64 keys and values of each head.
    assert [row["macs"] for row in found] == [
        size - 32 - layers * 2 * 32 + layers * 2 * 64 * heads * 8
        for size, (layers, heads, _, _) in zip(by_hand, (row["sizes"].values() for row in found), strict=True)
    ]
    assert found[0]["bytes"] > found[1]["bytes"] > found[3]["bytes"]
    assert all(
        row["bytes"] == (tmp_path / f"{row['name'].replace(' ', '-')}.safetensors").stat().st_size for row in found
    )
    assert all(row["says"].startswith(smollm2.PROMPT) for row in found)

    # The function that was made smaller equals the whole one under masks, and the smaller Llama on the same parameters.
    dense = train_small(scan=True)
    layers, plan = (
        structured.Plan.from_json((tmp_path / f"{name}.json").read_text()) for name in ("layers", "channels")
    )
    assert plan.kept["layers/mlp_norm/scale"] == layers.kept["layers/mlp_norm/scale"]
    tokens = dense.windows("test", 2, 48, seed=0)
    graph = structured.trace(dense.logits, dense.params, tokens)
    assert structured.verify(graph, plan, dense.params, tokens).passed
    params, _ = jaxprune.load_sparse(tmp_path / smollm2_smaller.REPAIRED)
    small = smollm2_smaller.smaller(dense, params)
    expected = jax.jit(small.logits)(params, tokens)
    np.testing.assert_allclose(structured.rebuild(graph, plan)(params, tokens), expected, rtol=1e-4, atol=1e-4)

    # Behind each stage a run goes on to the same table.
    results = json.loads((tmp_path / "results.json").read_text())
    for done in (4, 2):
        (tmp_path / "results.json").write_text(json.dumps({**results, "rows": results["rows"][:done]}))
        smollm2_smaller.run([*options, "--resume"])
        assert rows(tmp_path) == found
    assert "bits per byte" in capsys.readouterr().out
    with pytest.raises(UsageError, match="another --learning-rate"):
        smollm2_smaller.run([*options, "--resume", "--learning-rate", "1e-3"])


@pytest.mark.slow
def test_layers_of_their_own_widths_have_as_many_parameters_in_all(tmp_path):
    options = [*OPTIONS, "--kv", "0"]
    for widths in ("equal", "own"):
        smollm2_smaller.run([*options, "--drop-layers", "0", "--widths", widths, "--out", str(tmp_path / widths)])
    equal, own = ({row["name"]: row for row in rows(tmp_path / widths)} for widths in ("equal", "own"))
    smollm2_smaller.run([*options, "--drop-layers", "1", "--widths", "own", "--out", str(tmp_path / "fewer")])
    fewer = rows(tmp_path / "fewer")
    assert [row["name"] for row in fewer] == STAGES
    assert [row["sizes"]["heads"] for row in fewer] == [[4, 4], *[[4]] * 4]
    assert list(own) == ["dense", "cut", "repaired", "distilled"]
    assert own["dense"]["bits_per_byte"] == pytest.approx(equal["dense"]["bits_per_byte"], abs=0.01)
    sizes = own["repaired"]["sizes"]
    assert sizes["layers"] == 2
    assert sizes["heads"] == [4, 4]
    assert sizes["inner"][0] != sizes["inner"][1]
    # Widths are priced in steps of a thirty-second: of 3 x 32 parameters for each of 64 channels.
    assert 0 <= equal["repaired"]["parameters"] - own["repaired"]["parameters"] <= 2 * 3 * 32
    assert own["repaired"]["bits_per_byte"] < equal["repaired"]["bits_per_byte"]
    small = smollm2_smaller.smaller(
        train_small(scan=False),
        smollm2.reopen(train_small(scan=False), tmp_path / "own" / "repaired.safetensors").params,
    )
    assert small.network.config.inner == tuple(sizes["inner"])


@pytest.mark.slow
def test_other_choices_and_a_model_from_nothing_are_there_to_compare(tmp_path):
    smollm2_smaller.run([*OPTIONS, "--channels", "random", "--from-scratch", "--out", str(tmp_path)])
    found = {row["name"]: row for row in rows(tmp_path)}
    assert list(found) == [*STAGES, "from scratch"]
    assert found["repaired"]["bits_per_byte"] < found["cut"]["bits_per_byte"]
    assert found["distilled"]["bits_per_byte"] < found["from scratch"]["bits_per_byte"]
    assert found["from scratch"]["sizes"] == found["repaired"]["sizes"]
    assert not list(tmp_path.glob("*-so-far"))
    with pytest.raises(SystemExit):
        smollm2_smaller.run(["--small", "--widths", "own", "--channels", "norms"])


class Stopped(list):
    """Lessons that end a run when one of them is asked for."""

    def __init__(self, lessons, at):
        super().__init__(lessons)
        self.at = at

    def __getitem__(self, number):
        if number == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(number)


@pytest.mark.slow
def test_a_distillation_that_was_stopped_ends_with_the_same_bits(tmp_path):
    teacher = smollm2.train_small(scan=True, steps=40)
    fresh = teacher.network.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    steps = distilling.SAVE_EVERY + 5
    lessons = teacher.windows("train", 2 * steps, 32, seed=0).reshape(steps, 2, 32)

    def learn(lessons, name):
        pair = (teacher.hidden, fresh), (teacher.hidden, teacher.params)
        return distilling.distilled(*pair, lessons, 1e-3, tmp_path / name, smollm2.Console(quiet=True))

    expected = learn(lessons, "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(Stopped(lessons, distilling.SAVE_EVERY + 2), "parts")
    # What was learnt before does not happen again.
    found = learn(Stopped(lessons, 0), "parts")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
