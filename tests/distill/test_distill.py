"""Losses of distillation: against NumPy, against the formula without pieces, and what they hold in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import distill

BATCH, LENGTH, WIDTH, WIDER, VOCABULARY = 2, 5, 3, 4, 7
RNG = np.random.default_rng(0)
STUDENT = {
    "hidden": RNG.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32),
    "table": RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
}
TEACHER = {
    "hidden": RNG.normal(size=(BATCH, LENGTH, WIDER)).astype(np.float32),
    "table": RNG.normal(size=(VOCABULARY, WIDER)).astype(np.float32),
}
MASK = np.array([[True, True, True, False, False], [True] * 5])


def loss(student, teacher, **options):
    return distill.logit_loss(
        student["hidden"],
        teacher["hidden"],
        lambda hidden: hidden @ student["table"].T,
        lambda hidden: hidden @ teacher["table"].T,
        **options,
    )


def at_once(student, teacher, mask, temperature):
    """The formula, on all logits."""
    logits = [jnp.einsum("bld,vd->blv", model["hidden"], model["table"]) for model in (student, teacher)]
    log_q, log_p = (jax.nn.log_softmax(each / temperature) for each in logits)
    log_p = jax.lax.stop_gradient(log_p)
    losses = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(jnp.where(mask, losses, 0.0)) / np.float32(np.sum(mask))


def oracle(temperature: float, mask: np.ndarray) -> float:
    """Hinton et al., section 2, token by token in float64."""
    found = []
    for place in np.argwhere(mask):
        q, p = (
            np.exp(np.float64(model["table"]) @ model["hidden"][tuple(place)] / temperature)
            for model in (STUDENT, TEACHER)
        )
        q, p = q / q.sum(), p / p.sum()
        found.append(temperature**2 * np.sum(p * np.log(p / q)))
    return float(np.mean(found))


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 128), (2.0, 4), (0.5, 1), (3.0, 6)])
def test_the_divergence_is_that_of_an_oracle_whatever_the_pieces(temperature, chunk):
    for mask in (None, MASK):
        found = loss(STUDENT, TEACHER, mask=mask, temperature=temperature, chunk=chunk)
        assert found.dtype == np.float32
        expected = oracle(temperature, np.ones_like(MASK) if mask is None else mask)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_gradients_are_those_of_the_formula_at_once_and_the_teacher_has_none(chunk):
    student, teacher = jax.tree.map(jnp.asarray, (STUDENT, TEACHER))
    found = jax.grad(functools.partial(loss, mask=MASK, temperature=2.0, chunk=chunk), argnums=(0, 1))(student, teacher)
    expected = jax.grad(at_once)(student, teacher, MASK, 2.0)
    for name in ("hidden", "table"):
        np.testing.assert_allclose(found[0][name], expected[name], rtol=1e-4, atol=1e-6)
        assert not found[1][name].any()
    assert not found[0]["hidden"][~MASK].any()


def test_the_gradient_has_the_same_size_at_every_temperature():
    # In the limit of high temperatures it is that of half the squared distance of the centred logits, over their number.
    student, teacher = jax.tree.map(jnp.asarray, (STUDENT, TEACHER))

    def squares(student):
        difference = student["hidden"] @ student["table"].T - teacher["hidden"] @ teacher["table"].T
        return jnp.mean(jnp.var(difference, axis=-1)) / 2

    found = jax.grad(lambda student: loss(student, teacher, temperature=300.0))(student)
    expected = jax.grad(squares)(student)
    np.testing.assert_allclose(found["table"], expected["table"], rtol=0.05, atol=1e-2)


def test_tokens_that_do_not_count_may_hold_anything():
    held = jax.tree.map(jnp.asarray, (STUDENT, TEACHER))
    spoiled = [model | {"hidden": jnp.where(MASK[..., None], model["hidden"], jnp.nan)} for model in held]
    for value in (functools.partial(loss, mask=MASK, chunk=4), jax.grad(functools.partial(loss, mask=MASK, chunk=4))):
        jax.tree.map(np.testing.assert_array_equal, value(*held), value(*spoiled))
    assert float(loss(*held, mask=np.zeros_like(MASK))) == 0.0


def test_a_token_that_the_teacher_never_predicts_costs_nothing():
    head = lambda hidden: jnp.where(jnp.arange(2) == 1, -jnp.inf, hidden)  # noqa: E731
    one = jnp.zeros((1, 2))
    assert float(distill.logit_loss(one, one, head, head)) == 0.0
    # The student gives half its probability away.
    np.testing.assert_allclose(distill.logit_loss(one, one, lambda hidden: hidden, head), np.log(2.0), rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    student, teacher = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (STUDENT, TEACHER))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (student, teacher))
    multiply = functools.partial(jnp.einsum, "...d,vd->...v", preferred_element_type=jnp.float32)
    found = distill.logit_loss(
        student["hidden"],
        teacher["hidden"],
        lambda hidden: multiply(hidden, student["table"]),
        lambda hidden: multiply(hidden, teacher["table"]),
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, loss(*wide), rtol=1e-5)


@pytest.mark.optimised
def test_no_array_of_all_logits_exists_forward_or_backward():
    """Two sequences of 1,024 tokens and a vocabulary of SmolLM2's size: their logits alone are 403 MB."""
    batch, length, width, vocabulary = 2, 1024, 32, 49_152
    logits = 4 * batch * length * vocabulary
    shapes = {
        "hidden": jax.ShapeDtypeStruct((batch, length, width), np.float32),
        "table": jax.ShapeDtypeStruct((vocabulary, width), np.float32),
    }
    value = jax.value_and_grad(functools.partial(loss, mask=np.ones((batch, length), bool), chunk=32))
    held = jax.jit(value).lower(shapes, shapes).compile().memory_analysis().temp_size_in_bytes
    formula = jax.value_and_grad(functools.partial(at_once, mask=np.ones((batch, length), bool), temperature=1.0))
    whole = jax.jit(formula).lower(shapes, shapes).compile().memory_analysis().temp_size_in_bytes
    assert whole >= 2 * logits
    assert held <= logits / 8


def test_a_step_with_donated_buffers_learns_the_teacher():
    teacher = jax.tree.map(jnp.asarray, TEACHER)
    params = {"table": jnp.asarray(STUDENT["table"]), "project": jnp.eye(WIDER, WIDTH)}
    tx = optax.adam(optax.cosine_decay_schedule(0.3, 60))

    def student_loss(params):
        return loss({"hidden": teacher["hidden"] @ params["project"], "table": params["table"]}, teacher, chunk=4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        value, grads = jax.value_and_grad(student_loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    before = params
    state, values = tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # which Adam needs
        for _ in range(60):
            params, state, value = step(params, state)
            values.append(float(value))
    assert before["table"].is_deleted()
    assert values[-1] < values[0] / 20


def test_hidden_errors_are_relative_to_each_token_and_the_mean_over_layers():
    student, teacher = (RNG.normal(size=(2, BATCH, LENGTH, WIDTH)).astype(np.float32) for _ in range(2))
    teacher[:, 0, 0] *= 1_000  # as the first token of a language model has
    relative = np.sum(np.square(np.float64(student - teacher)), -1) / np.sum(np.square(np.float64(teacher)), -1)
    np.testing.assert_allclose(distill.hidden_loss(list(student), list(teacher)), relative.mean(), rtol=1e-5)
    expected = relative[:, MASK].mean()
    np.testing.assert_allclose(distill.hidden_loss(list(student), list(teacher), mask=MASK), expected, rtol=1e-5)
    spoiled = np.where(MASK[..., None], student, np.nan)
    assert float(distill.hidden_loss(list(spoiled), list(teacher), mask=MASK)) == pytest.approx(expected, rel=1e-5)
    grads = jax.grad(lambda s, t: distill.hidden_loss(s, t, mask=MASK), argnums=(0, 1))(spoiled[0], teacher[0])
    wanted = 2 * (student - teacher)[0] / np.sum(np.square(teacher[0]), -1, keepdims=True) / MASK.sum()
    np.testing.assert_allclose(grads[0], np.where(MASK[..., None], wanted, 0), rtol=1e-4, atol=1e-7)
    assert not np.any(grads[1])
    assert float(distill.hidden_loss(student[0], np.zeros_like(student[0]), mask=np.zeros_like(MASK))) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: loss(s, t | {"hidden": t["hidden"][:, :4]}), r"student is \[2, 5, 3\] and teacher \[2, 4, 4\]"),
        (lambda s, t: loss(s | {"hidden": s["hidden"][0, 0]}, t), r"student is \[3\]; give hidden states"),
        (lambda s, t: loss(s, t | {"table": t["table"][:6]}), "student_head knows 7 tokens and teacher_head 6"),
        (lambda s, t: loss(s, t, mask=MASK[0]), r"mask is bool\[5\], not bool\[2, 5\]"),
        (lambda s, t: loss(s, t, mask=MASK.astype(np.float32)), "mask is float32"),
        (lambda s, t: loss(s, t, chunk=0), "at least 1; got 0"),
        (
            lambda s, t: distill.logit_loss(s["hidden"], s["hidden"], lambda h: h.sum(), lambda h: h),
            "student_head makes",
        ),
        (
            lambda s, t: distill.hidden_loss([s["hidden"]], [t["hidden"]]),
            r"student\[0\] is \[2, 5, 3\] and teacher\[0\]",
        ),
        (lambda s, t: distill.hidden_loss({"a": s["hidden"]}, {}), r"no entry for student\['a'\]"),
        (lambda s, t: distill.hidden_loss([], []), "no hidden states"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*jax.tree.map(jnp.asarray, (STUDENT, TEACHER)))
