"""Which channels to cut, at equal multiply-accumulates: accuracies right after the cut, repaired, and fine-tuned.

    python -m benchmarks.structured_quality --mnist ../shared/data/mnist10k

The CNN of the examples on handwritten digits of 8 x 8 pixels, and a ResNet on those of MNIST, each trained once for every seed and
cut by each way to the same budget. Where torch-pruning is installed it chooses on the same weights, exported, by the norm of
coupled weights (DepGraph), in each layer, over all, and among groups of one structure; a way that empties a layer before it meets
the budget has no row for that seed. Whoever chose, the same functions cut,
repair, measure and train: parameters are masked, which computes what smaller ones do and compiles once.

"repaired" is the cut network after least squares on training images (`structured.repair`); "fine-tuned" starts from that. The
ResNet trains with norms over the batch, is cut with these folded into scales and offsets, and has them measured anew
wherever it is tested. MNIST is read from a folder with two gzipped IDX files (t10k-*): of its 10,000 images 6,000 are trained on, 2,000
left for choosing (here unused) and 2,000 tested on, drawn by the seed.
"""

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxprune
from benchmarks import mnist, timing
from jaxprune import scores, structured

Tree = Any
Fn = Callable[[Tree, jax.Array], jax.Array]
BATCH, LEARNING_RATE, MOMENTUM, TUNING_RATE = 64, 0.05, 0.9, 0.01
CALIBRATION, GRADIENTS, STATISTICS, EPSILON = 512, 256, 1024, 1e-5
STAGES = ((1, 1), (2, 2), (4, 2))  # widths of the ResNet, strides of the first of two convolutions


class Data(NamedTuple):
    """Images ``[N, H, W, 1]`` in float32 and labels."""

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Network(NamedTuple):
    """A function of parameters, how to make and train these, and for how long.

    Attributes:
        fn: what is cut and tested.
        training: what is trained: the same, or with norms over the batch.
        fold: parameters that were trained, and images, to those of `fn`.
        macs: the share of its multiply-accumulates that may stay.
    """

    name: str
    fn: Fn
    training: Fn
    fold: Callable[[Tree, jax.Array], Tree]
    params: Tree
    data: Data
    epochs: int
    tuning: int
    macs: float


def _split(images: np.ndarray, labels: np.ndarray, seed: int, train: int, test: int) -> Data:
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = order[:train], order[len(order) - test :]
    return Data(*(jnp.asarray(each[part]) for part in parts for each in (images, labels)))


def digits(seed: int) -> Data:
    """Handwritten digits, 1,437 to train on and 360 to test on."""
    source = load_digits()
    return _split(source.images[..., None].astype(np.float32) / 16, source.target.astype(np.int32), seed, 1437, 360)


def pixels(folder: Path, seed: int) -> Data:
    """The 10,000 images of MNIST's test set."""
    images, labels = mnist.read(folder)
    return _split(images.astype(np.float32) / 255, labels, seed, 6000, 2000)


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(math.sqrt(2 / math.prod(shape[:-1])) * rng.normal(size=shape), jnp.float32)


def convolve(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    """Convolve, padded so that both sides get the same: what torch's ``padding`` does."""
    edge = kernel.shape[0] // 2
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides,) * 2, ((edge, edge),) * 2, dimension_numbers=layout)


def _pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def cnn(params: Tree, x: jax.Array) -> jax.Array:
    """Two convolutions, each pooled, and two dense layers."""
    for name in "ab":
        x = _pool(jax.nn.relu(convolve(x, params[name]["w"]) + params[name]["b"][None, None, None]))
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["c"]["w"] + params["c"]["b"][None])
    return x @ params["d"]["w"] + params["d"]["b"][None]


def cnn_params(seed: int) -> Tree:
    """Parameters of `cnn`."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 3, 1, 32), "b": (3, 3, 32, 64), "c": (256, 100), "d": (100, 10)}
    return {name: {"w": _normal(rng, *shape), "b": jnp.zeros(shape[-1])} for name, shape in shapes.items()}


def resnet(params: Tree, x: jax.Array, norm: Callable[[Tree, jax.Array], jax.Array] | None = None) -> jax.Array:
    """A stem of stride 2, three residual blocks and a mean; each convolution with a scale and an offset behind."""
    norm = norm or (lambda p, x: x * p["scale"][None, None, None] + p["offset"][None, None, None])

    def layer(x: jax.Array, p: Tree, strides: int = 1) -> jax.Array:
        return norm(p, convolve(x, p["w"], strides))

    x = jax.nn.relu(layer(x, params["stem"], 2))
    for (_, strides), block in zip(STAGES, params["blocks"], strict=True):
        y = layer(jax.nn.relu(layer(x, block["a"], strides)), block["b"])
        x = jax.nn.relu(y + (layer(x, block["skip"], strides) if "skip" in block else x))
    return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"][None]


def resnet_params(seed: int, width: int) -> Tree:
    """Parameters of `resnet`."""
    rng = np.random.default_rng(seed)

    def convolution(window: int, ins: int, outs: int) -> Tree:
        return {"w": _normal(rng, window, window, ins, outs), "scale": jnp.ones(outs), "offset": jnp.zeros(outs)}

    params: Tree = {"stem": convolution(3, 1, width), "blocks": []}
    ins = width
    for factor, strides in STAGES:
        outs = width * factor
        block = {"a": convolution(3, ins, outs), "b": convolution(3, outs, outs)}
        params["blocks"].append(block | ({"skip": convolution(1, ins, outs)} if (strides, ins) != (1, outs) else {}))
        ins = outs
    return params | {"head": {"w": _normal(rng, ins, 10), "b": jnp.zeros(10)}}


def batch_normed(params: Tree, x: jax.Array) -> jax.Array:
    """`resnet` in training, with norms over the batch."""

    def norm(p: Tree, x: jax.Array) -> jax.Array:
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        return (x - mean) * lax.rsqrt(var + EPSILON) * p["scale"][None, None, None] + p["offset"][None, None, None]

    return resnet(params, x, norm)


def fold(params: Tree, images: jax.Array) -> Tree:
    """Return parameters whose scales and offsets have taken up the statistics of these images, layer by layer."""
    found: list[tuple[jax.Array, jax.Array]] = []

    def norm(p: Tree, x: jax.Array) -> jax.Array:
        scale = p["scale"] * lax.rsqrt(x.var((0, 1, 2)) + EPSILON)
        found.append((scale, p["offset"] - scale * x.mean((0, 1, 2))))
        return x * scale[None, None, None] + found[-1][1][None, None, None]

    resnet(params, images, norm)
    taken = iter(found)

    def put(p: Tree) -> Tree:
        scale, offset = next(taken)
        return {"w": p["w"], "scale": scale, "offset": offset}

    folded = {"stem": put(params["stem"]), "blocks": [], "head": params["head"]}
    for block in params["blocks"]:
        folded["blocks"].append({name: put(block[name]) for name in ("a", "b", "skip") if name in block})
    return folded


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Trainer:
    """Trains and tests a network's parameters under masks; compiled once for all of them."""

    def __init__(self, network: Network) -> None:
        data, self._tx = network.data, optax.sgd(1.0, MOMENTUM)
        self._data = data

        @jax.jit
        def step(params: Tree, state: Any, masks: Tree, batch: jax.Array, rate: jax.Array) -> Any:
            def loss(params: Tree) -> jax.Array:
                logits = network.training(jaxprune.apply_masks(params, masks), data.images[batch])
                return cross_entropy(logits, data.labels[batch])

            updates, state = self._tx.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), state

        self._step = step  # no scan: XLA's convolutions on a CPU are slow in loops

        @jax.jit
        def folded(params: Tree, masks: Tree) -> Tree:
            return network.fold(jaxprune.apply_masks(params, masks), data.images[:STATISTICS])

        self.folded = folded
        self._right = jax.jit(
            lambda params: (network.fn(params, data.test_images).argmax(-1) == data.test_labels).mean()
        )

    def train(self, params: Tree, masks: Tree, epochs: int, seed: int, rate: float = LEARNING_RATE) -> Tree:
        """Train with a rate that falls in a line, from epoch to epoch."""
        state, rng = self._tx.init(params), np.random.default_rng(seed)
        for number in range(epochs):
            size = len(self._data.labels) // BATCH * BATCH
            for batch in rng.permutation(len(self._data.labels))[:size].reshape(-1, BATCH):
                params, state = self._step(params, state, masks, batch, np.float32(rate * (1 - number / epochs)))
        return params

    def accuracy(self, params: Tree, masks: Tree) -> float:
        """Return the share of right answers in percent, norms being measured anew behind what masks remove."""
        return 100 * float(self._right(self.folded(params, masks)))


def with_norms(params: Tree, trained: Tree) -> Tree:
    """Return parameters with the scales and offsets that were trained in place of those that are folded."""

    def take(path: tuple[Any, ...], leaf: jax.Array, own: jax.Array) -> jax.Array:
        return own if _name(path[-1]) in ("scale", "offset") else leaf

    return jax.tree_util.tree_map_with_path(take, params, trained)


def choose(
    fn: Fn, params: Tree, data: Data, graph: structured.Graph, budget: float, seed: int, widths: int
) -> dict[str, structured.Plan]:
    """Return the plan of each way within the budget of multiply-accumulates."""
    images, labels = data.images[:CALIBRATION], data.labels[:CALIBRATION]
    grams = jaxprune.calibrate_grams(fn, params, [images])

    def loss(fn: Fn, params: Tree) -> jax.Array:
        return cross_entropy(fn(params, images), labels)

    taylor = scores.saliency(params, jax.grad(functools.partial(loss, fn))(params))
    each = jax.vmap(jax.grad(lambda p, x, y: cross_entropy(fn(p, x[None]), y[None])), (None, 0, 0))
    squares = jax.jit(lambda p, x, y: jax.tree.map(lambda g: jnp.square(g).mean(0), each(p, x, y)))(
        params, images[:GRADIENTS], labels[:GRADIENTS]
    )
    told: dict[str, dict[str, Any]] = {
        "random": {"scores": scores.random(params, jax.random.key(seed))},
        "l1": {"importance": functools.partial(scores.channel_norm, ord=1)},
        "l2": {"importance": scores.channel_norm},
        "Taylor": {"scores": taylor},
        "OSSCAR": {"grams": grams},
    }
    share = structured.sparsity_within(graph, budget)
    plans = {f"{name}, each layer": structured.select_channels(graph, params, share, **by) for name, by in told.items()}
    for name in ("l2", "OSSCAR"):
        for isomorphic in (False, True):
            title = f"{name}, {'isomorphic' if isomorphic else 'all layers'}"
            plans[title] = structured.select_channels_globally(
                graph, params, budget, isomorphic=isomorphic, **told[name]
            )
    prices = {
        "estimated": structured.price_widths(graph, params, grams=grams, squares=squares),
        "measured": structured.measure_widths(graph, params, loss, grams=grams, options=widths),
    }
    for name, priced in prices.items():
        found = structured.allocate_widths(graph, priced, budget)
        plans[f"knapsack, prices {name}"] = structured.select_channels(graph, params, found.k, grams=grams)
    return plans


def removed(graph: structured.Graph, params: Tree, gone: Mapping[str, Sequence[int]]) -> structured.Plan:
    """Return the plan without these channels of the layers that compute them, by the path of a kernel."""
    k = {}
    marks = {path: np.zeros(shape, np.float32) for path, shape in graph.by_path.items()}
    for path, channels in gone.items():
        size = graph.by_path[path][-1]
        k[path] = len(channels) / size
        marks[path][..., np.setdiff1d(np.arange(size), channels)] = 1
    flat = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    tree = jax.tree.unflatten(jax.tree.structure(params), [marks["/".join(map(_name, path))] for path in flat])
    return structured.select_channels(graph, params, k, scores=tree)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))


def run(network: Network, seed: int, widths: int, torch_pruning: Any) -> dict[str, Any]:
    """Train, cut in every way, repair, fine-tune; return the accuracies."""
    data, fn, trainer = network.data, network.fn, Trainer(network)
    graph = structured.trace(fn, network.params, data.images[:BATCH])
    nothing = structured.channel_masks(structured.Plan({}, {}), network.params)
    trained = trainer.train(network.params, nothing, network.epochs, seed)
    params = trainer.folded(trained, nothing)
    budget = network.macs * structured.count_macs(graph)
    plans = choose(fn, params, data, graph, budget, seed, widths)
    if torch_pruning is not None:
        for name, gone in torch_pruning(network.name, params, data.images[:1].shape, functools.partial(_cost, graph, params), budget).items():  # fmt: skip
            plans[f"torch-pruning, {name}"] = removed(graph, params, gone)
    grams = jaxprune.calibrate_grams(fn, params, [data.images[:CALIBRATION]])
    rows = {}
    for name, plan in plans.items():
        if structured.count_macs(graph, plan) > budget:
            raise RuntimeError(f"{name} costs {structured.count_macs(graph, plan):,}, more than {budget:,.0f}.")
        masks, repaired = structured.channel_masks(plan, params), structured.repair(plan, params, grams)
        repaired = with_norms(repaired, trained)
        tuned = trainer.train(repaired, masks, network.tuning, seed, TUNING_RATE)
        stages = {"cut": trained, "repaired": repaired, "fine-tuned": tuned}
        rows[name] = {stage: trainer.accuracy(found, masks) for stage, found in stages.items()}
        rows[name]["macs"] = structured.count_macs(graph, plan) / structured.count_macs(graph)
    return {
        "network": network.name,
        "macs": network.macs,
        "seed": seed,
        "dense": trainer.accuracy(trained, nothing),
        "rows": rows,
    }


def _cost(graph: structured.Graph, params: Tree, gone: Mapping[str, Sequence[int]]) -> int:
    return structured.count_macs(graph, removed(graph, params, gone))


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Show the mean over seeds of one network, and the standard error of the mean."""
    first = results[0]

    def of(values: Sequence[float]) -> str:
        error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return f"{np.mean(values):.1f} ± {error:.1f}"

    dense = of([result["dense"] for result in results])
    shown = Table(
        title=f"{first['network']}, {len(results)} seeds, {first['macs']:.0%} of the MACs; dense {dense} %",
        title_justify="left",
    )
    shown.add_column("channels chosen by")
    columns = ("macs", "cut", "repaired", "fine-tuned")
    for column in columns:
        shown.add_column("MACs, %" if column == "macs" else column, justify="right")
    for name in dict.fromkeys(name for result in results for name in result["rows"]):
        rows = [result["rows"][name] for result in results if name in result["rows"]]
        few = "" if len(rows) == len(results) else f" ({len(rows)} of {len(results)} seeds)"
        cells = [of([row[column] for row in rows]) for column in columns[1:]]
        shown.add_row(name + few, f"{100 * np.mean([row['macs'] for row in rows]):.1f}", *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--mnist", type=Path, help="the folder with MNIST; without it the ResNet is left out")
    parser.add_argument(
        "--macs",
        type=float,
        nargs=2,
        default=[0.1, 0.25],
        metavar="SHARE",
        help="that may stay, of each (default: 0.1 0.25)",
    )
    parser.add_argument("--width", type=int, default=8, help="of the ResNet's first stage (default: 8)")
    parser.add_argument("--epochs", type=int, nargs=2, default=[12, 6], metavar="N", help="for the CNN, for the ResNet")
    parser.add_argument(
        "--tuning", type=int, nargs=2, default=[5, 1], metavar="N", help="epochs after the cut, of each"
    )
    parser.add_argument("--widths", type=int, default=16, help="of each group that are measured (default: 16)")
    parser.add_argument("--no-digits", action="store_true", help="leave the CNN out")
    parser.add_argument("--no-torch", action="store_true", help="leave torch-pruning out")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console = Console(width=110)
    torch_pruning = None if options.no_torch else _torch(console)
    results = []
    for seed in track(options.seeds, "seeds", console=Console(stderr=True)):
        networks = []
        if not options.no_digits:
            data = digits(seed)
            made, as_it_is = cnn_params(seed), lambda params, images: params
            networks.append(
                Network(
                    "digits CNN", cnn, cnn, as_it_is, made, data, options.epochs[0], options.tuning[0], options.macs[0]
                )
            )
        if options.mnist is not None:
            data = pixels(options.mnist, seed)
            made = resnet_params(seed, options.width)
            networks.append(
                Network(
                    "MNIST ResNet",
                    resnet,
                    batch_normed,
                    fold,
                    made,
                    data,
                    options.epochs[1],
                    options.tuning[1],
                    options.macs[1],
                )
            )
        results += [run(network, seed, options.widths, torch_pruning) for network in networks]
        timing.write_json(options.json, results)
    for name in dict.fromkeys(result["network"] for result in results):
        console.print(table([result for result in results if result["network"] == name]))


def _torch(console: Console) -> Any:
    try:
        from benchmarks.structured_quality_torch import choose
    except ImportError as error:
        console.print(f"torch-pruning is left out: {error}")
        return None
    return choose


if __name__ == "__main__":
    main()
