"""What `export.save_onnx` writes, run by onnxruntime: every network of the zoo, cut and rebuilt, gives what it gives in JAX."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from jax import lax

from jaxprune import export
from jaxprune.structured import rebuild, select_channels, shrink, trace
from tests.support.graph_zoo import normal
from tests.support.structured_cases import CASES

CUT = [name for name in CASES if name != "weird"]


def run(path: Path, *inputs: Any) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [wanted.name for wanted in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, jax.tree.leaves(inputs)), strict=True)))


def operations(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def half(name: str) -> Any:
    case = CASES[name]()
    graph = trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)
    plan = select_channels(graph, case.params, {group.name: 0.5 for group in graph.groups})
    return case, rebuild(graph, plan), shrink(plan, case.params)


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_and_rebuilt_runs_elsewhere(name: str, tmp_path: Path) -> None:
    case, fn, small = half(name)
    path = export.save_onnx(tmp_path / "model.onnx", fn, small, *case.inputs)
    close(run(path, *case.inputs), fn(small, *case.inputs))


@pytest.mark.parametrize("name", ["cnn_linen", "resnet_eval", "vgg_haiku", "vit", "mixer", "gru"])
def test_an_axis_may_have_any_size(name: str, tmp_path: Path) -> None:
    case, fn, small = half(name)
    inputs = [jax.ShapeDtypeStruct(("batch", *x.shape[1:]), x.dtype) for x in case.inputs]
    path = export.save_onnx(tmp_path / "model.onnx", fn, small, *inputs)
    three = [jnp.concatenate([x, x[:1]]) for x in case.inputs]
    close(run(path, *three), fn(small, *three))


def test_what_was_taken_apart_is_whole_again(tmp_path: Path) -> None:
    case, fn, small = half("resnet_eval")
    found = operations(export.save_onnx(tmp_path / "resnet.onnx", fn, small, *case.inputs))
    assert not {"Sqrt", "Mul", "Sub", "Max"} & set(found)
    assert (found.count("Conv"), found.count("Relu")) == (6, 5)
    case, fn, small = half("transformer")
    found = operations(export.save_onnx(tmp_path / "transformer.onnx", fn, small, *case.inputs))
    assert (found.count("Softmax"), found.count("Gelu"), found.count("Exp")) == (2, 2, 0)
    case, fn, small = half("cnn_linen")
    path = export.save_onnx(tmp_path / "cnn.onnx", fn, small, *case.inputs)
    pools = [node for node in onnx.load(path).graph.node if node.op_type == "MaxPool"]
    assert [list(pool.attribute[0].ints) for pool in pools] == [[2, 2], [2, 2]]


def test_names_that_differ_in_signs_and_results_that_are_the_same(tmp_path: Path) -> None:
    def fn(params: Any, x: Any) -> Any:
        y = x["a-b"] + params * x["a_b"]
        return {"[/]": y, "[//]": y, "as it was": x["a_b"], "whole": jnp.maximum(x["n"], 0), "constant": params * 3}

    x = {"a-b": normal(2, 3), "a_b": normal(2, 3, salt=1), "n": jnp.array([-1, 2], jnp.int32)}
    path = export.save_onnx(tmp_path / "model.onnx", fn, jnp.float32(2), x)
    close(run(path, x), fn(2.0, x))


@pytest.mark.parametrize("name", ["cnn_linen", "gru", "loops"])
def test_no_constant_is_left_over(name: str, tmp_path: Path, capfd: Any) -> None:
    case, fn, small = half(name)
    path = export.save_onnx(tmp_path / "model.onnx", fn, small, *case.inputs)
    capfd.readouterr()
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert "not used" not in capfd.readouterr().err


def test_poolings_with_padding_and_steps_of_their_own(tmp_path: Path) -> None:
    def fn(params: Any, x: Any) -> Any:
        x = x * params
        most = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0)))
        total = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return {"most": most, "total": total}

    x = normal(2, 7, 6, 3)
    path = export.save_onnx(tmp_path / "model.onnx", fn, jnp.float32(2), x)
    close(run(path, x), fn(2.0, x))
    model = onnx.load(path).graph
    assert [info.name for info in (*model.input, *model.output)] == ["input_0", "output_most", "output_total"]


def _pooled(x: Any) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").sum()


def test_errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="jax2onnx does not convert this function: .*") as caught:
        export.save_onnx(path, lambda p, x: jax.grad(_pooled)(x), (), normal(1, 4, 4, 1))
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"params\['w'\]"):
        export.save_onnx(path, lambda p, x: x, {"w": "text"}, jnp.ones(2))
    assert not path.exists()
    path.write_bytes(b"")
    with pytest.raises(FileExistsError, match="force=True"):
        export.save_onnx(path, lambda p, x: x * p, jnp.ones(2), jnp.ones(2))
    assert path.read_bytes() == b""
