"""Everything that a device decides, in one command: masks, steps, solvers, calibration and cut networks.

    python -m benchmarks.accelerator > results.json
    python -m benchmarks.accelerator --small > results.json      # on a CPU

Runs on whatever device JAX finds, each beside what one would write in plain JAX and, where torch is installed, in torch on
the same device. Prints JSON; tables and progress go to the standard error. Cases that would begin after `--minutes` are
left out, and named.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxprune
from benchmarks import accelerator_torch as torch_side
from benchmarks import timing
from benchmarks.shrink import transformer
from jaxprune import oneshot, rules, structured

SPARSITY = 0.9
BATCHES = 16  # of a calibration
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
Runs = Mapping[str, Callable[[], Any]]


class Sizes(NamedTuple):
    """How large everything is."""

    weights: int  # of each of eight layers whose masks are made
    width: int  # of the MLP that is trained and calibrated
    batch: int
    solved: int  # inputs and outputs of the layer that is solved
    model_width: int  # of the transformer that is cut
    length: int


LARGE = Sizes(weights=4_096, width=4_096, batch=2_048, solved=4_096, model_width=1_024, length=512)
SMALL = Sizes(weights=512, width=512, batch=128, solved=256, model_width=256, length=64)


class Case(NamedTuple):
    """Variants to compare, the first being the baseline of all ratios."""

    part: str
    title: str
    runs: Callable[[], Runs]


def ready(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Return a call that ends when the device has."""
    return lambda: jax.block_until_ready(function(*arguments))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Draw float32 weights on the device."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32) / shape[0] ** 0.5


# Masks


def masks(sizes: Sizes) -> Iterator[Case]:
    """Masks of eight square layers, by four rules."""
    by_torch = {
        "std": torch_side.std,
        "layer": torch_side.layer,
        "global": torch_side.all_layers,
        "2:4": torch_side.n_m,
    }
    for name, (rule, k, plain) in {
        "std": (rules.std_threshold, 1.0, lambda w: jnp.abs(w) >= jnp.std(w)),
        "layer": (rules.layer_sparsity, SPARSITY, lambda w: _above(w, jnp.sort(jnp.abs(w), axis=None))),
        "global": (rules.global_sparsity, SPARSITY, None),
        "2:4": (rules.n_m(4), 2, _top_two),
    }.items():

        def runs(name: str = name, rule: Any = rule, k: Any = k, plain: Any = plain) -> Runs:
            params = {f"layer_{i}": {"kernel": normal(sizes.weights, sizes.weights, seed=i)} for i in range(8)}
            by_hand = _globally if plain is None else functools.partial(jax.tree.map, plain)
            return {
                "plain JAX": ready(jax.jit(by_hand), params),
                "jaxprune": ready(
                    jax.jit(functools.partial(jaxprune.make_masks, rule=rule)), params, jnp.float32(k) if k != 2 else k
                ),
                **torch_side.masks(by_torch[name], [np.asarray(leaf) for leaf in jax.tree.leaves(params)]),
            }

        yield Case("masks", f"{name}, 8 x {sizes.weights}^2 weights", runs)


def _above(w: jax.Array, ordered: jax.Array) -> jax.Array:
    return jnp.abs(w) >= ordered[round(SPARSITY * w.size)]


def _globally(params: Any) -> Any:
    ordered = jnp.sort(jnp.concatenate([jnp.abs(w).ravel() for w in jax.tree.leaves(params)]))
    threshold = ordered[round(SPARSITY * ordered.size)]
    return jax.tree.map(lambda w: jnp.abs(w) >= threshold, params)


def _top_two(w: jax.Array) -> jax.Array:
    groups = jnp.abs(w).reshape(-1, 4, w.shape[1])
    ranks = jnp.argsort(jnp.argsort(-groups, axis=1), axis=1)
    return (ranks < 2).reshape(w.shape)


# Steps


def _network(params: Any, x: jax.Array) -> jax.Array:
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name]["kernel"])
    return x


def _mlp(sizes: Sizes) -> tuple[Any, jax.Array]:
    params = {f"layer_{i}": {"kernel": normal(sizes.width, sizes.width, seed=i)} for i in range(4)}
    return params, normal(sizes.batch, sizes.width, seed=9)


def steps(sizes: Sizes) -> Iterator[Case]:
    """A step of Adam on an MLP: dense, with masks that stay, with masks that change."""

    def runs(every: int) -> Runs:
        params, x = _mlp(sizes)
        masks = jaxprune.make_masks(params, SPARSITY, rule=rules.layer_sparsity)
        make = functools.partial(jaxprune.make_masks, rule=rules.layer_sparsity)
        adam = optax.adam(1e-4)
        held = optax.chain(adam, jaxprune.keep_pruned(masks))
        changing = {
            "jaxprune prune": optax.chain(adam, jaxprune.prune(make, SPARSITY, every=every)),
            "jaxprune rigl": jaxprune.rigl(adam, masks, every=every, until=10**9),
        }
        pruned = jaxprune.apply_masks(params, masks)
        chosen = {"plain JAX, dense": adam, "jaxprune keep_pruned": held, **changing}
        found: dict[str, Callable[[], Any]] = {name: _stepper(tx, pruned, x) for name, tx in chosen.items()}
        found["plain JAX, times a mask"] = _stepper(adam, pruned, x, masks)
        kernels, kept = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (pruned, masks))
        return {**found, **torch_side.steps(kernels, kept, np.asarray(x))}

    title = f"Adam, 4 x {sizes.width}^2 weights, batch {sizes.batch}"
    yield Case("steps", f"{title}; masks stay", functools.partial(runs, 10**6))
    yield Case("steps", f"{title}; masks change", functools.partial(runs, 1))


def _stepper(tx: optax.GradientTransformation, params: Any, x: jax.Array, masks: Any = None) -> Callable[[], Any]:
    def loss(params: Any) -> jax.Array:
        if masks is not None:
            params = jax.tree.map(jnp.multiply, params, jax.tree.map(lambda m: m.astype(jnp.float32), masks))
        return jnp.mean(jnp.square(_network(params, x)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> Any:
        params, inner = state
        updates, inner = tx.update(jax.grad(loss)(params), inner, params)
        return optax.apply_updates(params, updates), inner

    state = jax.jit(lambda params: (jax.tree.map(jnp.copy, params), tx.init(params)))(params)

    def run() -> Any:
        nonlocal state
        state = jax.block_until_ready(step(state))

    return run


# Solvers


def solvers(sizes: Sizes) -> Iterator[Case]:
    """One layer solved; plain JAX solves a dense system of its size, the least that any of them could do."""

    def runs() -> Runs:
        params = {"kernel": normal(sizes.solved, sizes.solved)}
        x = normal(2 * sizes.solved, sizes.solved, seed=1) @ (
            jnp.eye(sizes.solved) + normal(sizes.solved, sizes.solved, seed=2)
        )
        grams = jaxprune.calibrate_grams(lambda p, x: x @ p["kernel"], params, [x])
        masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
        (site,) = grams.sites
        gram = grams.of(site)[0]

        def dense(gram: jax.Array, weights: jax.Array) -> jax.Array:
            damped = gram + 0.01 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
            return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), gram @ weights)

        return {
            "plain JAX, one dense solution": ready(jax.jit(dense), gram, params["kernel"]),
            "jaxprune sparsegpt": ready(functools.partial(oneshot.sparsegpt, k=0.5), params, grams),
            "jaxprune reconstruct": ready(oneshot.reconstruct, params, masks, grams),
            "jaxprune reconstruct, damping given": ready(
                functools.partial(oneshot.reconstruct, damping=0.01), params, masks, grams
            ),
            "jaxprune admm": ready(functools.partial(oneshot.admm, k=0.5), params, grams),
            **torch_side.solvers(np.asarray(params["kernel"]), np.asarray(gram)),
        }

    yield Case("solvers", f"{sizes.solved}^2 weights", runs)


# Calibration


def calibration(sizes: Sizes) -> Iterator[Case]:
    """Batches through an MLP: forward, with statistics by hand, with those of `calibrate_*`, which read and compile each time."""

    def runs() -> Runs:
        params, x = _mlp(sizes)

        def by_hand(params: Any, x: jax.Array) -> Any:
            found = []
            for name in sorted(params):
                found.append(jnp.matmul(x.T, x, precision="highest"))
                x = jax.nn.relu(x @ params[name]["kernel"])
            return found

        return {
            "plain JAX, forward": _in_turn(jax.jit(_network), params, x),
            "plain JAX, Grams by hand": _in_turn(jax.jit(by_hand), params, x),
            "jaxprune calibrate_grams, all of it": ready(
                lambda: jaxprune.calibrate_grams(_network, params, [x] * BATCHES).sums
            ),
            "jaxprune calibrate_norms, all of it": ready(
                lambda: jaxprune.calibrate_norms(_network, params, [x] * BATCHES).sums
            ),
            **torch_side.calibration([np.asarray(leaf) for leaf in jax.tree.leaves(params)], np.asarray(x), BATCHES),
        }

    yield Case("calibration", f"4 x {sizes.width}^2 weights, {BATCHES} x {sizes.batch} samples", runs)


def _in_turn(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready([function(*arguments) for _ in range(BATCHES)][-1])


# Cut networks


def cut(sizes: Sizes) -> Iterator[Case]:
    """A transformer with half its heads and hidden units: dense, rebuilt, and written at the smaller widths."""

    def runs() -> Runs:
        network = transformer(4, 8, sizes.model_width, sizes.length)
        graph = structured.trace(network.fn, network.params, network.x)
        plan = structured.select_channels(graph, network.params, 0.5)
        small = structured.shrink(plan, network.params)
        arrays = [jax.tree.map(np.asarray, tree) for tree in (network.params, small)]
        return {
            "plain JAX, dense": ready(jax.jit(network.fn), network.params, network.x),
            "jaxprune rebuild": ready(jax.jit(structured.rebuild(graph, plan)), small, network.x),
            "plain JAX, at these widths": ready(jax.jit(network.fn), small, network.x),
            **torch_side.cut(*arrays, np.asarray(network.x)),
        }

    yield Case("cut networks", f"transformer, width {sizes.model_width}, {sizes.length} tokens", runs)


PARTS: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "masks": masks, "steps": steps, "solvers": solvers, "calibration": calibration, "cut": cut,
}  # fmt: skip


def measure(case: Case, seconds: float, console: Console) -> dict[str, Any]:
    """Call every variant once, then as many rounds as there is time for; show and return the results."""
    runs, first, again = case.runs(), {}, {}
    for name, run in runs.items():
        for times in (first, again):
            start = time.perf_counter()
            run()
            times[name] = time.perf_counter() - start
    round_takes = sum(again.values()) + again[next(iter(runs))]
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(round_takes, 1e-6))))
    rows = timing.compare(runs, rounds)
    console.print(timing.table(f"{case.part}: {case.title}; {rounds} rounds", rows))
    return {
        "part": case.part, "case": case.title, "rounds": rounds, "first_call": first,
        "rows": [row._asdict() for row in rows],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables on the standard error and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case begins that would end later (default: 8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds for each case (default: 10)")
    parser.add_argument("--torch-threads", type=int, help="all cores unless given; on busy cores its threads wait")
    options = parser.parse_args(arguments)
    torch_side.use_threads(options.torch_threads)
    console = Console(stderr=True)
    start, slowest = time.perf_counter(), 0.0
    sizes = SMALL if options.small else LARGE
    results, left_out = [], []
    for case in (case for part in options.parts for case in PARTS[part](sizes)):
        begun = time.perf_counter()
        # A case takes about as long as the slowest so far.
        if begun - start + slowest > 60 * options.minutes:
            left_out.append(f"{case.part}: {case.title}")
            continue
        results.append(measure(case, options.seconds, console))
        slowest = max(slowest, time.perf_counter() - begun)
    device = jax.devices()[0]
    found = {
        "device": f"{device.platform} ({device.device_kind})", "jax": jax.__version__, "torch": torch_side.describe(),
        "sizes": sizes._asdict(), "seconds": time.perf_counter() - start, "cases": results, "left_out": left_out,
    }  # fmt: skip
    json.dump(found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
