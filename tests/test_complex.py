"""Complex weights are pruned by their modulus, everywhere alike, or refused by name: every public function that takes parameters."""

import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import algebra, choose, export, learned, oneshot, plot, rules, scores, storage, structured, transforms

RNG = np.random.default_rng(0)
W = (RNG.normal(size=(8, 4)) + 1j * RNG.normal(size=(8, 4)) * 3 + 0.5j).astype(np.complex64)
V = RNG.normal(size=(4, 4)).astype(np.float32)
PARAMS = {"spectral": {"kernel": jnp.asarray(W)}, "dense": {"kernel": jnp.asarray(V)}}
SIZES = {"spectral": {"kernel": jnp.abs(PARAMS["spectral"]["kernel"])}, "dense": PARAMS["dense"]}
X = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)


def fn(params, x):
    hidden = x.astype(jnp.complex64) @ params["spectral"]["kernel"]
    return jnp.real(hidden) @ params["dense"]["kernel"]


MASKS = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity)
KEPT = np.asarray(MASKS["spectral"]["kernel"])
PRUNED = jaxprune.apply_masks(PARAMS, MASKS)
REFUSED = r"params\['spectral'\]\['kernel'\].*complex"
NAMES_IT = pytest.raises(TypeError, match=REFUSED)


def spectral(tree):
    return np.asarray(tree["spectral"]["kernel"])


def is_zero(values):
    """Zero in both parts, and of either no minus."""
    assert (values == 0).all()
    assert not np.signbit(values.real).any()
    assert not np.signbit(values.imag).any()


def test_std_threshold_goes_by_the_modulus_and_the_deviation_of_complex_numbers():
    masks = spectral(jaxprune.make_masks(PARAMS, 1.0))
    np.testing.assert_array_equal(masks, np.abs(W) >= np.std(W.astype(np.complex128)))
    assert not masks.all()
    row = jaxprune.summarize(PARAMS, jaxprune.make_masks(PARAMS, 1.0)).rows[1]
    assert row.path == "spectral/kernel"
    assert row.std == pytest.approx(np.std(W.astype(np.complex128)), rel=1e-6)
    assert row.threshold == pytest.approx(np.abs(W)[masks].min(), rel=1e-6)
    # At a scale where squares leave the range, and with entries that are not finite.
    huge = {"kernel": jnp.asarray(W * np.float32(1e30))}
    np.testing.assert_array_equal(jax.tree.leaves(jaxprune.make_masks(huge, 1.0))[0], masks)
    holed = {"kernel": jnp.asarray(W).at[0, 0].set(complex(np.nan, 1.0))}
    found = np.asarray(jaxprune.make_masks(holed, 0.0)["kernel"])
    assert not found[0, 0]
    assert found.sum() == found.size - 1


@pytest.mark.parametrize(
    ("rule", "k"),
    [
        (rules.mean_threshold, 1.0),
        (rules.max_threshold, 0.5),
        (rules.absolute_threshold, 2.0),
        (rules.layer_sparsity, 0.5),
        (rules.row_sparsity, 0.5),
        (rules.global_sparsity, 0.5),
        (rules.erk_sparsity, 0.5),
        (rules.n_m(4), 2),
        (rules.channels(rules.layer_sparsity), 0.5),
        (rules.channels(rules.max_threshold), 0.9),
        (rules.blocks(rules.layer_sparsity, (2, 2)), 0.5),
        (functools.partial(rules.std_threshold, max_sparsity=0.25), 0.0),
        (lambda scores, k: jax.tree.map(lambda score: score >= k, scores), 2.0),
    ],
    ids=lambda value: value.name if isinstance(value, rules.Rule) else None,
)
def test_rules_take_the_modulus(rule, k):
    found, expected = jaxprune.make_masks(PARAMS, k, rule=rule), jaxprune.make_masks(SIZES, k, rule=rule)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    given = jaxprune.make_masks(PARAMS, k, rule=rule, scores=scores.magnitude(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, given, found)


def test_scores_of_weights():
    np.testing.assert_allclose(spectral(scores.magnitude(PARAMS)), np.abs(W), rtol=1e-6)
    np.testing.assert_allclose(spectral(scores.lamp(PARAMS)), spectral(scores.lamp(SIZES)), rtol=1e-5)
    drawn = spectral(scores.random(PARAMS, jax.random.key(0)))
    np.testing.assert_array_equal(drawn, spectral(scores.random(SIZES, jax.random.key(0))))
    for found in (scores.magnitude(PARAMS), scores.lamp(PARAMS), scores.random(PARAMS, jax.random.key(0))):
        assert spectral(found).dtype == np.float32
    with pytest.raises(ValueError, match=r"scores for params\['spectral'\]\['kernel'\] are complex64.*not real"):
        jaxprune.make_masks(PARAMS, 1.0, scores=PARAMS)


def test_scores_of_channels():
    np.testing.assert_allclose(scores.channel_norm(W, 0), np.linalg.norm(W, axis=0), rtol=1e-6)
    np.testing.assert_allclose(scores.channel_norm(W, 0, ord=1), np.abs(W).sum(0), rtol=1e-6)
    gaps = np.linalg.norm(W[:, :, None] - W[:, None], axis=0).sum(0)
    np.testing.assert_allclose(scores.fpgm(W, 0), gaps, rtol=1e-5)
    np.testing.assert_allclose(scores.batch_norm_scale(W[0]), np.abs(W[0]), rtol=1e-6)


def test_scores_of_gradients_are_the_change_of_the_loss():
    def loss(params):
        return jnp.sum(jnp.abs(params["spectral"]["kernel"] - (1 + 2j)) ** 2) / 1e3

    grads = jax.grad(loss)({"spectral": PARAMS["spectral"]})
    params = {"spectral": PARAMS["spectral"]}
    np.testing.assert_allclose(spectral(scores.gradient(params, grads)), np.abs(2 * (W - (1 + 2j))) / 1e3, rtol=1e-5)
    step = 1e-6
    there = W.astype(np.complex128)
    change = (np.abs(there * (1 - step) - (1 + 2j)) ** 2 - np.abs(there - (1 + 2j)) ** 2) / 1e3 / step
    np.testing.assert_allclose(spectral(scores.saliency(params, grads)), np.abs(change), atol=1e-6)
    np.testing.assert_allclose(spectral(scores.movement(params, grads)), change, atol=1e-6)
    np.testing.assert_allclose(spectral(scores.snip(params, grads)).sum(), 1.0, rtol=1e-6)
    with NAMES_IT:
        scores.fisher(params, grads)
    with NAMES_IT:
        scores.grasp(loss, params)
    with NAMES_IT:
        scores.synflow(fn, PARAMS, X)
    assert spectral(jaxprune.mean_over_batches(lambda params, x: params, PARAMS, [X])).dtype == np.complex64


def test_masks_applied_read_and_required():
    assert KEPT.sum() == 16
    np.testing.assert_array_equal(spectral(PRUNED)[KEPT], W[KEPT])
    is_zero(spectral(PRUNED)[~KEPT])
    jax.tree.map(np.testing.assert_array_equal, algebra.masks_of(PRUNED), MASKS)
    algebra.require_pruned(PRUNED, MASKS)
    with pytest.raises(ValueError, match=r"params\['spectral'\]\['kernel'\] has 16 pruned weight"):
        algebra.require_pruned(PARAMS | {"dense": PRUNED["dense"]}, MASKS)
    imaginary = {"kernel": jnp.full((2, 2), 1j)}
    assert algebra.masks_of(imaginary)["kernel"].all()
    assert float(jaxprune.sparsity(MASKS)) == 0.5


ADAM = optax.adam(0.01)
MAKE = functools.partial(jaxprune.make_masks, rule=rules.layer_sparsity)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: optax.chain(ADAM, jaxprune.keep_pruned(MASKS)), True),
        (lambda: optax.chain(ADAM, transforms.keep_zeros()), True),
        (lambda: optax.chain(ADAM, jaxprune.prune(MAKE, 0.5)), True),
        (lambda: optax.chain(ADAM, transforms.prune_and_regrow(MAKE, 0.5)), False),
        (lambda: transforms.static_sparse(ADAM, MASKS), True),
        (lambda: jaxprune.rigl(ADAM, MASKS, every=1, until=2), False),
        (lambda: transforms.sparse_evolution(ADAM, MASKS, jax.random.key(0), every=1, until=2), False),
        (lambda: transforms.elsa(ADAM, MAKE, 0.5, every=1, until=1), False),
        (lambda: optax.chain(ADAM, transforms.prune_and_splice(MAKE, 0.5, until=1)), False),
        (
            lambda: transforms.prune_by_gradients(
                ADAM, lambda params, mean, k: MAKE(params, k, scores=mean), 0.5, measure=scores.saliency
            ),
            False,
        ),
    ],
    ids=[
        "keep_pruned",
        "keep_zeros",
        "prune",
        "prune_and_regrow",
        "static_sparse",
        "rigl",
        "sparse_evolution",
        "elsa",
        "prune_and_splice",
        "prune_by_gradients",
    ],
)
def test_transforms_keep_exact_zeros(make, held):
    tx, params = make(), PRUNED
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.conj, jax.grad(lambda params: jnp.sum(fn(params, X) ** 2))(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # for Adam's second moments, which optax keeps real
        for _ in range(2):
            params, state = step(params, state)
    try:
        gone = ~spectral(jaxprune.masks_in(state))
    except ValueError:  # it has no masks
        gone = ~KEPT
    assert gone.sum() == 16
    is_zero(spectral(params)[gone])
    assert not held or (gone == ~KEPT).all()
    assert spectral(params).dtype == np.complex64
    assert (spectral(params) != W)[KEPT].any()


def test_reparametrisations():
    tx = transforms.decay_pruned(lambda params, k: MASKS, 0.5, rate=0.5)
    updates = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)[0]
    np.testing.assert_allclose(spectral(updates), np.where(KEPT, 0, W / 2), rtol=1e-6)
    through = jax.grad(
        lambda params: jnp.sum(jnp.real(transforms.straight_through(params, MASKS)["spectral"]["kernel"]))
    )
    np.testing.assert_array_equal(spectral(through(PARAMS)), np.ones_like(W))
    shrunk = spectral(transforms.soft_threshold(PARAMS, 0.0))
    np.testing.assert_allclose(shrunk, W / np.abs(W) * np.maximum(np.abs(W) - 0.5, 0), rtol=1e-5, atol=1e-6)
    merged = transforms.merge_lora(
        jnp.asarray(W), jnp.asarray(W[:, :1]), jnp.ones((1, 4), jnp.complex64), jnp.asarray(KEPT)
    )
    np.testing.assert_allclose(merged, np.where(KEPT, W + W[:, :1], 0), rtol=1e-5)


def test_sites_show_it_and_calibration_refuses_it():
    sites = jaxprune.find_sites(fn, PARAMS, X)
    assert {(site.path, site.in_axes, site.out_axes) for site in sites} == {
        ("dense/kernel", (0,), (1,)),
        ("spectral/kernel", (0,), (1,)),
    }
    assert sites.unused == ()
    masks = jaxprune.make_masks(PARAMS, 1, rule=rules.n_m(4), sites=sites)
    assert (spectral(masks).reshape(2, 4, 4).sum(1) == 1).all()
    for calibrate in (jaxprune.calibrate_norms, jaxprune.calibrate_grams):
        with NAMES_IT:
            calibrate(fn, PARAMS, [X])
        real = calibrate(fn, PARAMS, [X], where=lambda site: site.path == "dense/kernel")
        assert real.of(real.sites.sites[0]).dtype == jnp.float32
        # Data, too, may be complex.
        with pytest.raises(TypeError, match=r"params\['kernel'\], or what it multiplies, is complex"):
            calibrate(
                lambda params, x: x @ params["kernel"].astype(jnp.complex64),
                {"kernel": jnp.asarray(V)},
                [jnp.ones((3, 4), jnp.complex64)],
            )


def test_solvers_and_scores_of_data_refuse_it():
    which = {"where": lambda site: site.path == "dense/kernel"}
    norms, grams = (make(fn, PARAMS, [X], **which) for make in (jaxprune.calibrate_norms, jaxprune.calibrate_grams))
    for refused in (
        lambda: scores.wanda(PARAMS, norms),
        lambda: scores.ria(PARAMS, norms),
        lambda: scores.obs(PARAMS, grams),
        lambda: oneshot.sparsegpt(PARAMS, grams, 0.5),
        lambda: oneshot.gptq(PARAMS, grams),
        lambda: oneshot.prune_and_quantize(PARAMS, grams, 0.5),
        lambda: oneshot.admm(PARAMS, grams, 0.5),
        lambda: oneshot.reconstruct(PARAMS, MASKS, grams),
        lambda: oneshot.swap(PARAMS, MASKS, grams),
        lambda: oneshot.swap_and_reconstruct(PARAMS, MASKS, grams),
        lambda: oneshot.sequential(fn, PARAMS, [X], functools.partial(oneshot.sparsegpt, k=0.5)),
        lambda: oneshot.synflow_masks(fn, PARAMS, X, 0.5, rounds=2),
    ):
        with NAMES_IT:
            refused()
    # Left out, it does not hinder the others.
    pruned, masks = oneshot.sparsegpt(PARAMS, grams, 0.5, prunable="dense", damping=1.0)
    np.testing.assert_array_equal(spectral(pruned), W)
    plan = structured.select_channels(structured.trace(fn, PARAMS, X), PARAMS, 0.5)
    repaired = structured.repair(plan, PARAMS, grams, damping=1.0)
    np.testing.assert_array_equal(spectral(repaired), W)
    assert (np.asarray(repaired["dense"]["kernel"]) != V).any()
    assert np.asarray(masks["dense"]["kernel"]).sum() == 8
    plan, repaired = structured.select_in_sequence(structured.trace(fn, PARAMS, X), PARAMS, 0.5, [X])
    np.testing.assert_array_equal(spectral(repaired), W)
    assert (np.asarray(repaired["dense"]["kernel"]) != V).any()
    assert len(plan.kept["spectral/kernel"][1]) == 2
    squares = jax.tree.map(lambda w: jnp.square(jnp.abs(w)), PARAMS)
    (prices,) = structured.price_widths(
        structured.trace(fn, PARAMS, X), PARAMS, grams=grams, squares=squares
    ).values()  # of the real weights that read complex ones
    assert list(prices) == [1, 2, 3, 4]
    assert prices[1] > prices[2] > prices[3] > prices[4] == 0
    (measured,) = structured.measure_widths(
        structured.trace(fn, PARAMS, X),
        PARAMS,
        lambda small, p: jnp.sum(jnp.square(small(p, X) - fn(PARAMS, X))),
        grams=grams,
    ).values()
    assert measured[1] > measured[3] > measured[4] == 0
    swapped, turned = {"up": V.T, "down": W.T}, lambda p, x: jnp.tanh(x @ p["up"]).astype(jnp.complex64) @ p["down"]
    real = np.ones((5, V.shape[1]), np.float32)
    with pytest.raises(TypeError, match=r"select_in_sequence is of real weights, but params\['down'\] is complex64"):
        structured.select_in_sequence(structured.trace(turned, swapped, real), swapped, 0.5, [real])


def test_channels_are_cut_by_the_modulus():
    graph = structured.trace(fn, PARAMS, X)
    plan = structured.select_channels(graph, PARAMS, 0.5)
    norms = np.sqrt((np.abs(W) ** 2).sum(0) + (V**2).sum(1))
    assert sorted(plan.kept["spectral/kernel"][1]) == sorted(np.argsort(-norms)[:2].tolist())
    assert structured.select_channels_globally(graph, PARAMS, 120).kept == plan.kept
    assert structured.shrink(plan, PARAMS)["spectral"]["kernel"].dtype == jnp.complex64
    times = structured.measure_times(
        graph, PARAMS, X, repeats=1, timer=lambda fn, p, x: float(p["dense"]["kernel"].size)
    )
    assert (
        structured.check_times(times, plan, PARAMS, X, timer=lambda fn, p, x: float(p["dense"]["kernel"].size)).error
        == 0
    )
    assert structured.count_bytes(graph, plan) == 8 * 2 * W.shape[0] + 4 * 2 * V.shape[1]
    assert structured.verify(graph, plan, PARAMS, X).passed
    weights = W.shape[0] + V.shape[1]
    assert float(structured.group_lasso(graph, PARAMS)) == pytest.approx(np.sqrt(weights) * norms.sum(), rel=1e-5)
    slope = jax.grad(lambda params: structured.group_lasso(graph, params))(PARAMS)["spectral"]["kernel"]
    np.testing.assert_allclose(np.conj(slope), np.sqrt(weights) * W / norms, rtol=1e-5)
    zero = jax.grad(lambda params: structured.group_lasso(graph, params))(jax.tree.map(jnp.zeros_like, PARAMS))
    is_zero(spectral(zero) + 0)
    np.testing.assert_allclose(
        structured.masked(graph)(PARAMS, structured.channel_masks(plan, PARAMS), X),
        structured.rebuild(graph, plan)(structured.shrink(plan, PARAMS), X),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_choices():
    def evaluate(params):
        return -jnp.sum(jnp.square(fn(params, X) - fn(PARAMS, X)))

    curves = jaxprune.sensitivity(evaluate, PARAMS, [0.25, 0.5], rule=rules.layer_sparsity)
    assert curves.groups == ("dense/kernel", "spectral/kernel")
    masks = jaxprune.make_masks({"spectral": PARAMS["spectral"]}, 0.5, rule=rules.layer_sparsity)
    alone = PARAMS | jaxprune.apply_masks({"spectral": PARAMS["spectral"]}, masks)
    assert curves.metric[1, 1] == pytest.approx(float(evaluate(alone)), rel=1e-4)
    k = jaxprune.search_k(evaluate, PARAMS, max_drop=1e9, rule=rules.layer_sparsity, steps=2)
    assert float(k) == 1.0
    assert set(choose.allocate(curves, 0.3)) == {"dense", "spectral"}
    shares = choose.allocate_by_loss(PARAMS, 0.5, scores=scores.magnitude(PARAMS))
    joint = jaxprune.make_masks(PARAMS, 0.5, rule=functools.partial(rules.global_sparsity, max_sparsity=0.95))
    assert shares["spectral"]["kernel"] == 1 - spectral(joint).mean()


def test_files(tmp_path):
    for compress in (False, True):
        saved = jaxprune.save_sparse(tmp_path / "tree", PARAMS, MASKS, compress=compress, quantize=8, force=True)
        loaded, masks = jaxprune.load_sparse(tmp_path / "tree")
        np.testing.assert_array_equal(
            spectral(loaded), spectral(PRUNED)
        )  # real leaves are quantised, complex ones are not
        np.testing.assert_array_equal(spectral(masks), KEPT)
        assert [row.bits for row in saved.tensors] == [8, 64]
    plain = {"spectral.weight": W, "dense.weight": V}
    jaxprune.save_sparse(tmp_path / "plain", plain)
    for rule, k in ((rules.std_threshold, 1.0), (rules.layer_sparsity, 0.5), (rules.global_sparsity, 0.5)):
        storage.prune_file(tmp_path / "plain", tmp_path / "pruned", k, rule=rule, force=True)
        expected = jaxprune.make_masks(plain, k, rule=rule)
        loaded, masks = jaxprune.load_sparse(tmp_path / "pruned")
        np.testing.assert_array_equal(masks["spectral.weight"], expected["spectral.weight"])
        np.testing.assert_array_equal(loaded["spectral.weight"], np.where(expected["spectral.weight"], W, 0))
    storage.convert_file(tmp_path / "pruned", tmp_path / "dense", dense=True)
    assert not storage.diff_files(tmp_path / "pruned", tmp_path / "dense")
    row = next(row for row in storage.summarize_file(tmp_path / "dense").tensors if row.path == "spectral.weight")
    assert row.kept == int(np.count_nonzero(expected["spectral.weight"]))
    assert row.threshold == pytest.approx(np.abs(W)[np.asarray(expected["spectral.weight"])].min(), rel=1e-6)
    assert storage.stored_bytes(PARAMS, MASKS, bits=8) < storage.stored_bytes(PARAMS, MASKS)


def test_a_bundle(tmp_path):
    export.save(tmp_path / "bundle", fn, PRUNED, X, masks=MASKS)
    bundle = export.load(tmp_path / "bundle")
    np.testing.assert_array_equal(spectral(bundle.params), spectral(PRUNED))
    np.testing.assert_allclose(bundle(X), fn(PRUNED, X), rtol=1e-5)


def test_language_models_are_real(tmp_path):
    params = {"embed": {"embedding": W}, "layer_0": {}, "norm": {"scale": W[0]}}
    config = {"model_type": "llama", "head_dim": 2}
    for write in (
        lambda: export.write_hugging_face(tmp_path / "m", params, config),
        lambda: export.write_gguf(tmp_path / "m", params, config),
        lambda: export.to_maxtext(params, config),
    ):
        with pytest.raises(ValueError, match=r"params\['embed'\]\['embedding'\] is complex64, not real"):
            write()


def test_experts_are_measured_by_the_modulus():
    params = {"router": jnp.eye(8, 3), "experts": jnp.stack([PARAMS["spectral"]["kernel"] * n for n in (1, 2, 3)])}

    def mixture(params, x):
        weights = jax.nn.one_hot(jnp.argmax(x @ params["router"], -1), 3, dtype=jnp.complex64)
        return jnp.real(jnp.einsum("te,td,edf->tf", weights, x.astype(jnp.complex64), params["experts"]))

    graph = structured.trace(mixture, params, X)
    use = structured.expert_use(graph, params, [X])["router[1]"]
    best = np.argmax(np.asarray(X)[:, :3], 1)
    added = np.linalg.norm(np.asarray(X) @ W, axis=1) * (best + 1)
    np.testing.assert_allclose(use.added, [added[best == n].sum() for n in range(3)], rtol=1e-5)


def test_learned_masks_are_real():
    key = jax.random.key(0)
    soft = learned.soft_masks(learned.weight_gates(PARAMS, key, prior=MASKS), key, 0, steps=2)
    np.testing.assert_allclose(spectral(learned.apply_soft_masks(PARAMS, soft)), W * spectral(soft), rtol=1e-6)
    np.testing.assert_allclose(learned.kept_norm(PARAMS, soft), learned.kept_norm(SIZES, soft), rtol=1e-6)
    gates = learned.pattern_gates(PARAMS, 2, 4, key, prior=MASKS)
    assert (
        spectral(gates).dtype == spectral(learned.soft_patterns(gates, PARAMS, 2, key, 0, steps=2)).dtype == np.float32
    )
    assert (spectral(learned.pattern_masks(gates, PARAMS, 2)).reshape(2, 4, 4).sum(1) == 2).all()


def test_healing():
    def loss(params, scale):
        return scale * jnp.sum(jnp.real(params["spectral"]["kernel"]))  # whose gradient is the scale

    found = transforms.heal(loss, PARAMS, MASKS, [jnp.float32(0.5)], optax.sgd(1.0))
    np.testing.assert_allclose(spectral(found.params), np.where(spectral(MASKS), W - 0.5, 0), rtol=1e-6)


def test_rows_compressed():
    sparse = storage.to_bcsr(PARAMS, MASKS)["spectral"]["kernel"]
    x = jnp.ones((3, 8), jnp.complex64)
    np.testing.assert_allclose(storage.multiply_bcsr(x, sparse), x @ spectral(PRUNED), rtol=1e-4)


@pytest.mark.slow
def test_pictures(tmp_path):
    from matplotlib.figure import Figure

    axes = plot.weights(W, 1.0, Figure().subplots())
    assert axes.get_xlabel() == "modulus of the weight"
    jaxprune.report(tmp_path / "page.html", PRUNED, MASKS)
    assert (tmp_path / "page.html").stat().st_size > 10_000


# What takes parameters only to hand them on to functions of the caller's or to those tested here.
HANDED_ON = {"iterate", "verify_module", "select_blocks", "measure_blocks", "save_onnx"}


def test_every_public_function_of_parameters_is_tested_here():
    namespaces = (
        jaxprune,
        algebra,
        choose,
        export,
        learned,
        oneshot,
        plot,
        rules,
        scores,
        storage,
        structured,
        transforms,
    )
    names = {
        name
        for namespace in namespaces
        for name, thing in vars(namespace).items()
        if inspect.isfunction(thing) and "params" in inspect.signature(thing).parameters
    }
    assert len(names) > 40
    text = pathlib.Path(__file__).read_text()
    assert {name for name in names if not re.search(rf"\.{name}\b", text)} == HANDED_ON
