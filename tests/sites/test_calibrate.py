"""Statistics of inputs: against NumPy for every model of the zoo, and what goes wrong with bad input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.sites import _accumulate
from jaxprune.sites._accumulate import grams, sums_of_squares
from jaxprune.sites._calibrate import CalibrationWarning, Grams, Norms, _calibrate, calibrate_grams, calibrate_norms
from jaxprune.sites._find import read
from tests.support.graph_zoo import CASES, built, normal
from tests.support.slow import slow_but

# Most models of the zoo are given a handful of samples only.
pytestmark = pytest.mark.filterwarnings("ignore:These parameters have met fewer samples")


def both(contraction: Any, operands: Any) -> Any:
    """Measure both statistics at once, to compile once."""
    if contraction.kind == "gather":
        return {"norms": sums_of_squares(contraction, operands)}
    return {"norms": sums_of_squares(contraction, operands), "grams": grams(contraction, operands)}


@functools.cache
def observed(name: str) -> Any:
    """The sites of a case, its results under observation, and its statistics over two batches that are alike."""
    case = built(name)
    reading = read(case.fn, case.params, case.inputs)
    groups = set(reading.groups.values())
    run = jax.jit(lambda p, x: reading.run(jax.tree.leaves(p), jax.tree.leaves(x), both, groups))
    results, measured = run(case.params, case.inputs)
    stats = []
    for kind, keys in ((Norms, "norms"), (Grams, "grams")):
        found = {group: m[keys] for group, m in measured.items() if keys in m}
        sums = {g: m[0].reshape(-1, *m[0].shape[-1 if kind is Norms else -2 :]) for g, m in found.items()}
        once = kind(reading.sites, sums, {g: m[1].reshape(-1) for g, m in found.items()})
        stats.append(once + once)
    return results, *stats


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_outputs_stay_bit_equal(name: str) -> None:
    case = built(name)
    results, *_ = observed(name)
    plain = jax.jit(case.fn)(case.params, *case.inputs)
    assert jax.tree.structure(results) == jax.tree.structure(plain)
    for mine, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("name", slow_but(list(CASES)[::6], CASES))
def test_statistics_equal_those_of_the_inputs_themselves(name: str) -> None:
    case = built(name)
    _, norms, found = observed(name)
    assert not norms.sites.unresolved
    assert {site.path for site in norms.sites} == set(case.met)
    for path, met in case.met.items():
        for site, x in zip(norms.sites.at(path), met, strict=True):
            assert (site.matrix_shape[0], site.matrix_shape[1]) == (x.shape[0], x.shape[2])
            np.testing.assert_allclose(norms.of(site), np.sqrt(2 * np.square(x).sum(1)), rtol=2e-5, atol=1e-5)
            if name not in ("ragged", "chosen_by_data"):  # there the rows of other layers are zeros
                np.testing.assert_array_equal(norms.count(site), 2 * x.shape[1])
            if site.operation != "gather":
                gram = 2 * np.einsum("nti,ntj->nij", x, x)
                np.testing.assert_allclose(found.of(site), gram, rtol=2e-5, atol=2e-5 * max(np.abs(gram).max(), 1))
                assert found.of(site).dtype == found.count(site).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linen_scan", "used_twice", "nnx_tied"])
def test_calibration_adds_up_what_is_observed(name: str) -> None:
    case = built(name)
    _, norms, found = observed(name)
    for calibrate, expected in ((calibrate_norms, norms), (calibrate_grams, found)):
        stats = calibrate(case.fn, case.params, [case.inputs, case.inputs])
        assert set(stats.sums) == set(expected.sums)
        for site in stats.sites:
            np.testing.assert_allclose(stats.of(site), expected.of(site), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(list(CASES)[::6], CASES))
def test_norms_are_read_off_grams(name: str) -> None:
    _, norms, found = observed(name)
    read_off = found.norms()
    assert type(read_off) is Norms
    assert read_off.sites == found.sites
    assert set(read_off.sums) == {group for site in found.sites if site.operation != "gather" for group in site.groups}
    for site in (site for site in found.sites if site.operation != "gather"):
        np.testing.assert_allclose(read_off.of(site), norms.of(site), rtol=1e-5, atol=1e-6)
        assert read_off.count(site).tolist() == norms.count(site).tolist()


def test_counts_of_samples_are_those_of_each_layer() -> None:
    case = built("ragged")
    norms = calibrate_norms(case.fn, case.params, [case.inputs])
    assert norms.count(norms.sites.at("up")[0]).tolist() == [4, 0, 3]
    case = built("chosen_by_data")
    norms = calibrate_norms(case.fn, case.params, [case.inputs])
    assert norms.count(norms.sites.at("w")[0]).tolist() == [0, 5, 0]


def test_sums_of_bfloat16_are_taken_in_float32() -> None:
    x = jnp.full((4096, 1), 1.0, jnp.bfloat16)  # bfloat16 counts no further than 256
    params = {"w": jnp.ones((1, 1), jnp.bfloat16)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    found = calibrate_grams(fn, params, [x])
    assert float(found.of(found.sites.sites[0])[0, 0, 0]) == 4096
    assert float(calibrate_norms(fn, params, [x]).of(found.sites.sites[0])[0, 0]) == 64


def test_long_convolutions_are_measured_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:

    case = built("linen_conv")
    images = normal(5, 6, 6, 4)
    whole = calibrate_grams(case.fn, case.params, [images])
    site = whole.sites.sites[0]
    monkeypatch.setattr(_accumulate, "_PATCHES", 2 * 24 * 49)  # two images at a time, and one left over
    parts = calibrate_grams(case.fn, case.params, [images])
    np.testing.assert_allclose(parts.of(site), whole.of(site), rtol=1e-5, atol=1e-4)
    assert parts.count(site).tolist() == whole.count(site).tolist()


def test_wide_grams_are_whole_and_symmetric() -> None:
    x = normal(4, 20, 150, 2)
    found = calibrate_grams(lambda p, x: jnp.einsum("abcd,cdo->abo", x, p), normal(150, 2, 3), [x])
    gram = found.of(found.sites.sites[0])[0]
    flat = np.asarray(x, np.float64).reshape(80, 300)
    np.testing.assert_allclose(gram, flat.T @ flat, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(gram, gram.T)


def test_parameters_that_share_an_input_share_one_gram() -> None:
    case = built("linen_attention")
    found = calibrate_grams(case.fn, case.params, [case.inputs])
    q, k, v, out = (found.sites.at(f"{name}/kernel")[0].groups for name in ("query", "key", "value", "out"))
    assert q == k == v != out
    assert len(found.sums) == 2


def test_casts_of_one_input_stay_one_input() -> None:
    def fn(params: Any, x: Any) -> Any:
        return sum(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16) for w in params)

    found = calibrate_grams(fn, [normal(3, 2), normal(3, 2, salt=1)], [normal(8, 3)])
    assert len(found.sites) == 2
    assert len(found.sums) == 1


def test_statistics_are_pytrees_that_add() -> None:
    params = {"w": normal(3, 2)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    batches = [normal(8, 3, salt=i) for i in range(4)]
    whole = calibrate_grams(fn, params, batches)
    parts = calibrate_grams(fn, params, batches[:1]) + calibrate_grams(fn, params, iter(batches[1:]))
    site = whole.sites.sites[0]
    np.testing.assert_allclose(parts.of(site), whole.of(site), rtol=1e-6)
    assert parts.count(site).tolist() == [32]
    doubled = jax.jit(lambda stats: stats + stats)(whole)
    np.testing.assert_array_equal(doubled.of(site), 2 * whole.of(site))
    assert len({jax.tree.structure(whole), jax.tree.structure(parts)}) == 1


def test_statistics_add_up_by_psum() -> None:
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": normal(3, 2)}
    shards = [normal(8, 3, salt=i) for i in range(4)]
    parts = [calibrate_norms(fn, params, [x]) for x in shards]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    summed = jax.vmap(lambda part: jax.lax.psum(part, "shards"), axis_name="shards", out_axes=None)(stacked)
    site = summed.sites.sites[0]
    np.testing.assert_allclose(summed.of(site)[0], np.linalg.norm(np.concatenate(shards), axis=0), rtol=1e-5)
    assert summed.count(site).tolist() == [32]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_batches_may_be_sharded(kind: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    spec = jax.sharding.PartitionSpec
    case = built("linen_conv_grouped")
    x = normal(8, 6, 6, 4)
    expected = calibrate_grams(case.fn, case.params, [x])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, spec("data")))
        params = jax.device_put(case.params, jax.NamedSharding(mesh, spec()))
        found = calibrate_grams(case.fn, params, [sharded])
        site = found.sites.sites[0]
        np.testing.assert_allclose(found.of(site), expected.of(site), rtol=1e-5, atol=1e-4)


def test_compiles_once_and_reads_any_iterable() -> None:
    traces = []

    def fn(params: Any, x: Any, y: Any) -> Any:
        traces.append(1)
        return x["a"] @ params["w"] + y

    batches = (({"a": np.full((4, 3), i, np.float32)}, np.float32(i)) for i in range(5))
    norms = calibrate_norms(fn, {"w": normal(3, 2)}, batches)
    np.testing.assert_allclose(norms.of(norms.sites.sites[0]), np.full((1, 3), np.sqrt(4 * 30)), rtol=1e-6)
    assert len(traces) == 1


def test_where_restricts_what_is_measured() -> None:
    case = built("linen_attention")
    found = calibrate_grams(case.fn, case.params, [case.inputs], where=lambda site: site.path == "out/kernel")
    assert [site.path for site in found.sites] == ["out/kernel"]
    assert len(found.sums) == 1
    with pytest.raises(ValueError, match="of 4 site\\(s\\), none is asked for"):
        calibrate_grams(case.fn, case.params, [case.inputs], where=lambda site: False)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_norms(lambda p, x: x @ p, normal(3, 2), [normal(4, 3)], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "calibrating" in err


# ---- bad input


def test_no_batch() -> None:
    with pytest.raises(ValueError, match="no calibration batch"):
        calibrate_norms(lambda p, x: x @ p, normal(3, 2), iter([]))


def test_a_batch_of_another_shape() -> None:
    batches = [(normal(4, 3), {"y": normal(4)}), (normal(4, 3), {"y": normal(2)})]
    with pytest.raises(ValueError, match=r"batches\[1\]\[1\]\['y'\] is float32\[2\], in the first batch float32\[4\]"):
        calibrate_norms(lambda p, x, y: x @ p, normal(3, 2), batches)
    with pytest.raises(ValueError, match=r"batches\[1\] has another structure"):
        calibrate_norms(lambda p, x, y: x @ p, normal(3, 2), [batches[0], (normal(4, 3), [normal(4)])])


def test_nan_activations_name_the_first_parameter_they_meet() -> None:
    params = {"a": normal(3, 3), "b": normal(3, 2)}
    x = normal(4, 3)
    with pytest.raises(ValueError, match=r"meet params\['b'\] are NaN or infinite"):
        calibrate_grams(lambda p, x: jnp.log(-jnp.square(x @ p["a"])) @ p["b"], params, [x])


def test_fewer_samples_than_inputs_is_said() -> None:
    with pytest.warns(CalibrationWarning, match=r"params\['w'\]: 2 samples, 3 inputs"):
        calibrate_grams(lambda p, x: x @ p["w"], {"w": normal(3, 2)}, [normal(2, 3)])


def test_uses_that_are_not_understood_are_said() -> None:
    params = {"w": normal(3, 2), "v": normal(3, 2, salt=1)}
    with pytest.warns(CalibrationWarning, match=r"params\['v'\]: it is multiplied with data elementwise"):
        calibrate_norms(lambda p, x: x @ p["w"] + (x[:, :, None] * p["v"][None]).sum(1), params, [normal(4, 3)])


def test_nothing_to_calibrate() -> None:
    with pytest.raises(ValueError, match="multiplies no input by a floating-point parameter"):
        calibrate_norms(lambda p, x: x + p, normal(4, 3), [normal(4, 3)])


def test_statistics_of_different_functions_do_not_add() -> None:
    one = calibrate_norms(lambda p, x: x @ p, normal(3, 2), [normal(4, 3)])
    two = calibrate_norms(lambda p, x: x @ p, normal(3, 5), [normal(4, 3)])
    with pytest.raises(ValueError, match="different functions"):
        one + two


def test_tables_have_no_gram() -> None:
    case = built("nnx_tied")
    found = calibrate_grams(case.fn, case.params, [case.inputs])
    norms = calibrate_norms(case.fn, case.params, [case.inputs])
    table = norms.sites.at("embedding")[0]
    assert [site.operation for site in found.sites.at("embedding")] == ["dot"]
    with pytest.raises(ValueError, match=r"no such statistic of params\['embedding'\].* \(gather\)"):
        found.of(table)


def test_more_batches_trace_nothing_more():
    def traces(batches: int) -> int:
        traced = []

        def measure(contraction: Any, operands: Any) -> Any:
            traced.append(None)
            return grams(contraction, operands)

        params = {"kernel": jnp.ones((3, 2))}
        data = [jax.random.normal(jax.random.key(i), (4, 3)) for i in range(batches)]
        _calibrate(Grams, measure, 2, lambda params, x: x @ params["kernel"], params, data, None, False)
        return len(traced)

    assert traces(1) == traces(4)
