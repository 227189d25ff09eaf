"""Rows of a vocabulary that stay: logits of the rows kept against those of the whole function, by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structured import (
    Graph,
    Plan,
    channel_masks,
    combine,
    count_parameters,
    new_ids,
    old_ids,
    rebuild,
    select_channels,
    select_rows,
    shrink,
    trace,
    verify,
)
from tests.support.structured_depth import close
from tests.support.structured_zoo import normal

ROWS, WIDTH, INNER = 11, 4, 6
IDS = jnp.array([[9, 2, 4], [4, 7, 2]], jnp.int32)
MLP = {"up": normal(WIDTH, INNER), "down": normal(INNER, WIDTH)}
TIED = {"embed": {"table": normal(ROWS, WIDTH)}, **MLP}
UNTIED = {**TIED, "head": {"kernel": normal(WIDTH, ROWS), "bias": normal(ROWS)}}


def logits(params: Any, ids: Any) -> Any:
    x = jnp.take(params["embed"]["table"], ids, axis=0)
    x = x + jnp.tanh(x @ params["up"]) @ params["down"]
    if "head" in params:
        return x @ params["head"]["kernel"] + params["head"]["bias"][None, None]
    return x @ params["embed"]["table"].T


def likeliest(params: Any, ids: Any) -> Any:
    found = logits(params, ids)
    return jnp.argmax(found, -1), jnp.take_along_axis(jax.nn.log_softmax(found), ids[..., None], -1)


KEPT = [2, 4, 5, 7, 9]


def plan_of_words(params: Any, fn: Any = logits) -> tuple[Graph, Plan]:
    graph = trace(fn, params, IDS)
    tables = ["embed/table", "head/kernel"] if "head" in params else "*/table"
    return graph, select_rows(graph, tables, keep=[*IDS.ravel().tolist(), 5])


@pytest.mark.parametrize("params", [TIED, UNTIED], ids=["tied", "untied"])
def test_logits_of_the_rows_kept(params: Any):
    graph, plan = plan_of_words(params)
    small = shrink(plan, params)
    expected = np.asarray(logits(params, IDS))[..., KEPT]
    ids = new_ids(plan, IDS)
    assert ids.tolist() == [[4, 0, 1], [1, 3, 0]]
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(old_ids(plan, ids), IDS)
    close(rebuild(graph, plan)(small, ids), expected)
    close(logits(small, ids), expected)
    np.testing.assert_array_equal(small["embed"]["table"], params["embed"]["table"][jnp.array(KEPT)])
    axes = {"embed/table": 0, **({"head/kernel": 1, "head/bias": 0} if "head" in params else {})}
    assert plan.renumbered == axes
    assert plan.kept == {path: {axis: tuple(KEPT)} for path, axis in axes.items()}
    assert count_parameters(graph, plan) == sum(leaf.size for leaf in jax.tree.leaves(small))
    assert Plan.from_json(plan.to_json()) == plan
    assert int(channel_masks(plan, params)["embed"]["table"].sum()) == len(KEPT) * WIDTH
    with pytest.raises(ValueError, match="The plan renumbers the rows of embed/table"):
        verify(graph, plan, params, IDS)


def test_choices_are_made_in_new_numbers():
    graph, plan = plan_of_words(TIED, likeliest)
    small_fn, ids = rebuild(graph, plan), new_ids(plan, IDS)
    best, log_probabilities = small_fn(shrink(plan, TIED), ids)
    whole = np.asarray(logits(TIED, IDS))[..., KEPT]
    np.testing.assert_array_equal(old_ids(plan, best), np.array(KEPT)[whole.argmax(-1)])
    expected = jnp.take_along_axis(jax.nn.log_softmax(jnp.asarray(whole)), ids[..., None], -1)
    close(log_probabilities, expected)


def test_together_with_channels_at_another_batch():
    graph, rows = plan_of_words(UNTIED)
    plan = combine(select_channels(graph, UNTIED, {"up": 0.5}), rows)
    assert plan.renumbered == rows.renumbered
    more = jnp.array([[9, 9, 2, 5, 7]], jnp.int32)
    channels = select_channels(graph, UNTIED, {"up": 0.5})
    expected = rebuild(graph, channels)(shrink(channels, UNTIED), more)[..., jnp.array(KEPT)]
    close(rebuild(graph, plan)(shrink(plan, UNTIED), new_ids(plan, more)), expected)


def test_the_head_may_stay_whole():
    graph = trace(logits, UNTIED, IDS)
    plan = select_rows(graph, "embed/table[0]", keep=KEPT)
    assert set(plan.kept) == {"embed/table"}
    close(rebuild(graph, plan)(shrink(plan, UNTIED), new_ids(plan, IDS)), logits(UNTIED, IDS))


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"keep": IDS}, [2, 4, 7, 9]),
        ({"counts": [0, 3, 0, 0, 1, 0, 0, 9, 0, 0, 2]}, [1, 4, 7, 10]),
        ({"keep": [0, 4], "counts": [0, 3, 0, 0, 1, 0, 0, 9, 0, 0, 2]}, [0, 1, 4, 7, 10]),
        ({"keep": [0, 4], "counts": [0, 3, 0, 0, 1, 0, 0, 9, 0, 0, 2], "number": 3}, [0, 4, 7]),
        ({"counts": [0, 3, 0, 3, 3, 0, 0, 9, 0, 0, 2], "number": 3}, [1, 3, 7]),  # among equals the first ones
        ({"keep": [5, 9, 3], "round_to": 4}, [0, 3, 5, 9]),  # filled up
        ({"keep": [5, 9, 3], "counts": [0.5] * 11, "number": 5, "round_to": 4}, [0, 1, 2, 3, 4, 5, 6, 9]),
        ({"keep": range(10), "round_to": 8}, list(range(11))),  # no more than there are
    ],
)
def test_which_rows_stay(options: dict[str, Any], stays: list[int]):
    plan = select_rows(trace(logits, TIED, IDS), "embed/table", **options)
    assert plan.kept.get("embed/table", {0: tuple(range(ROWS))})[0] == tuple(stays)
    assert new_ids(plan, np.array(stays)).tolist() == list(range(len(stays)))


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ("embed/table", {"keep": [3, 11]}, "keep has 11, but the tables have 11 rows, from 0 on"),
        ("embed/table", {"keep": [-1]}, "keep has -1, but the tables have 11 rows"),
        ("embed/table", {"keep": [0.5]}, "keep is the numbers of rows, integers, not float64"),
        ("embed/table", {}, "No row would stay"),
        ("embed/table", {"counts": np.zeros(ROWS)}, "No row would stay"),
        ("embed/table", {"counts": np.ones(ROWS - 1)}, r"counts is a number, at least 0, for each of 11 rows, not of shape \(10,\)"),
        ("embed/table", {"counts": -np.ones(ROWS)}, "for each of 11 rows, not of shape .11,., from -1.0 on"),
        ("embed/table", {"keep": [1, 2], "number": 1}, "number is 1, but keep has 2 rows"),
        ("embed/table", {"keep": [1], "number": 0}, "number is a whole number, at least 1, not 0"),
        ("embed/table", {"keep": [1], "round_to": 2.0}, "round_to is a whole number, at least 1, not 2.0"),
        ("table", {"keep": [1]}, "tables names 'table', which is no parameter; there are down, embed/table, up"),
        ("embed/table[2]", {"keep": [1]}, r"tables names 'embed/table\[2\]', but embed/table has shape \(11, 4\)"),
        ("up", {"keep": [1]}, r"tables names up of shape \(4, 6\), of which no axes are chosen by number"),
        (["embed/table", "up[1]"], {"keep": [1]}, r"have equally many rows; those given have {'embed/table\[0\]': 11, 'up\[1\]': 6}"),
    ],
)  # fmt: skip
def test_bad_arguments(tables: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        select_rows(trace(logits, TIED, IDS), tables, **options)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, ids: logits(p, ids)[..., ::-1], "rev.*reversed|reversed"),
        (lambda p, ids: jnp.cumsum(logits(p, ids), -1), "cumsum runs along it"),
        (lambda p, ids: jax.nn.one_hot(ids, ROWS) @ p["embed"]["table"], "chosen by their number"),
    ],
)
def test_what_numbers_alone_do_not_decide(fn: Any, why: str):
    graph = trace(fn, TIED, IDS)
    with pytest.raises(ValueError, match=f"Rows along axis 0 of embed/table must stay: .*{why}"):
        select_rows(graph, "embed/table[0]", keep=[1, 2])
    # Nor does a plan that was made for another function pass.
    with pytest.raises(ValueError, match="which must stay"):
        rebuild(graph, plan_of_words(TIED)[1])


def test_a_plan_by_hand_does_not_renumber():
    graph, plan = plan_of_words(TIED)
    with pytest.raises(
        ValueError, match="cuts axis 0 of embed/table, which must stay: elements are chosen by an index"
    ):
        rebuild(graph, Plan(plan.kept, plan.shapes))


def test_numbers_that_are_gone():
    _, plan = plan_of_words(TIED)
    with pytest.raises(ValueError, match="The number 3 is of a row that is gone; unknown= says what stands for it"):
        new_ids(plan, [2, 3])
    with pytest.raises(ValueError, match="The number 11 is no row of 11"):
        new_ids(plan, [11], unknown=2)
    with pytest.raises(ValueError, match="unknown=3 is the old number of a row that stays, and 3 does not"):
        new_ids(plan, [2], unknown=3)
    with pytest.raises(ValueError, match="The number 5 is no row of the 5 that stay"):
        old_ids(plan, jnp.array([5]))
    assert new_ids(plan, np.array([2, 3, 9], np.uint16), unknown=5).tolist() == [0, 2, 4]
    assert new_ids(plan, np.array([2], np.uint16)).dtype == np.uint16
    assert jax.jit(lambda ids: new_ids(plan, ids, unknown=5))(jnp.array([2, 3, 9])).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="Under jit nothing can be raised"):
        jax.jit(lambda ids: new_ids(plan, ids))(IDS)
    with pytest.raises(ValueError, match="The plan renumbers no rows; make it by select_rows"):
        new_ids(Plan({}, {}), [1])


def test_two_vocabularies():
    params = {"source": normal(5, 3), "target": normal(4, 3)}
    graph = trace(lambda p, x, y: (p["source"][x] * p["target"][y]).sum(), params, jnp.array([1, 2]), jnp.array([0, 1]))
    plan = combine(select_rows(graph, "source", keep=[1, 4]), select_rows(graph, "target", keep=[2]))
    with pytest.raises(ValueError, match="The plan keeps other rows of source, target: say which with table="):
        new_ids(plan, [1])
    assert new_ids(plan, [4, 1], table="source").tolist() == [1, 0]
    assert old_ids(plan, [0], table="target").tolist() == [2]
    with pytest.raises(ValueError, match="The plan renumbers no rows of 'up', but those of source, target"):
        new_ids(plan, [1], table="up")
