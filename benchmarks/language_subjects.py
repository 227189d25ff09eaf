"""Language models that masks are compared on: a byte-level transformer that is trained once and kept, and SmolLM2."""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import smollm2
from _support import text
from rich.console import Console

import jaxprune

CALIBRATION_SEED = 0  # of SmolLM2's text
SMOLLM2_BATCH, SMOLLM2_CONTEXT = 2, 256


class Subject(NamedTuple):
    """A trained network, what was measured on the text that calibrates it, and its bits per byte on other text.

    Attributes:
      apply: what is calibrated, `(params, tokens) -> anything`.
      loss: `(params, windows) -> nats a token`.
      lessons: text to train on, of any number of steps, `(steps, seed) -> windows of each`.
      tokens: of one step.
      which: what is pruned, as every function takes it: `prunable=` or `sites=`.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batches: list[jax.Array]
    grams: Any
    loss: Callable[[Any, jax.Array], jax.Array]
    lessons: Callable[[int, int], Iterator[np.ndarray]]
    tokens: int
    quality: Callable[[Any], float]
    which: dict[str, Any]


def transformer(seed: int, options: argparse.Namespace, console: Console) -> Subject:
    """Load the byte-level transformer of `examples/language_model.py`, or train it and keep it."""
    shape = {"layers": 1, "width": 32} if options.small else {}
    network, sources = language_model.Transformer(**shape), text.load()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"seed-{seed}{'-small' if options.small else ''}-{options.steps}-steps.msgpack"
    params = language_model.trained(network, sources.train, options.steps, seed, path, console)
    context, batch_size = language_model.CONTEXT, language_model.BATCH_SIZE
    windows = text.windows(sources.train, 128, context, language_model.CALIBRATION_SEED)
    batches = [jnp.asarray(windows[start : start + 32, :-1]) for start in range(0, len(windows), 32)]
    fn = lambda params, tokens: network.apply({"params": params}, tokens)  # noqa: E731
    model = language_model.Model(fn, jax.tree.map(jnp.asarray, params), batches)
    others = sources.valid if options.valid else sources.test
    held_out = text.windows(others, options.windows or 512, context, language_model.TEST_SEED)

    def lessons(steps: int, seed: int) -> Iterator[np.ndarray]:
        for place in np.random.default_rng(seed).integers(2**31, size=steps):
            yield text.windows(sources.train, batch_size, context, int(place))

    return Subject(
        fn,
        model.params,
        batches,
        jaxprune.calibrate_grams(fn, model.params, batches),
        model.loss,
        lessons,
        batch_size * context,
        functools.partial(language_model.evaluate, model, windows=held_out),
        {"prunable": language_model.in_blocks},
    )


def smollm2_135m(seed: int, options: argparse.Namespace, console: Console) -> Subject:
    """Open SmolLM2, its layers in a scan; the seed is that of the text it learns from."""
    model = smollm2.train_small(scan=True, steps=options.steps) if options.small else smollm2.load(scan=True)
    length = 64 if options.small else SMOLLM2_CONTEXT
    windows = model.windows("train", 64, length, CALIBRATION_SEED)
    batches = list(jnp.asarray(windows.reshape(-1, smollm2.BATCH_SIZE, length)))
    held_out = model.windows("valid" if options.valid else "test", options.windows or 28, length, seed=0)

    def lessons(steps: int, seed: int) -> Iterator[np.ndarray]:
        yield from model.windows("train", SMOLLM2_BATCH * steps, length, seed + 1).reshape(steps, -1, length)

    return Subject(
        model.hidden,
        model.params,
        batches,
        jaxprune.calibrate_grams(model.hidden, model.params, batches),
        lambda params, windows: smollm2.total_nats(model.network, params, windows) / windows[:, 1:].size,
        lessons,
        SMOLLM2_BATCH * length,
        lambda params: model._replace(params=params).bits_per_byte(held_out, console),
        {"sites": jaxprune.find_sites(model.hidden, model.params, batches[0])},
    )
