"""Every public function on one tiny network: what the test of flags and meshes runs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import jaxprune
from jaxprune import (
    algebra,
    choose,
    distill,
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

_RNG = np.random.default_rng(0)
# Two layers and a table; inputs of rank two, so that no Gram matrix is singular.
PARAMS = {
    "a": {"kernel": _RNG.normal(size=(4, 8)), "bias": _RNG.normal(size=8)},
    "b": {"kernel": _RNG.normal(size=(8, 8)), "bias": _RNG.normal(size=8)},
}
X = _RNG.normal(size=(32, 4))
SPECS = {
    "a": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
    "b": {"kernel": PartitionSpec("model", None), "bias": PartitionSpec()},
}


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Two dense layers with a residual block, in the words of both kinds of mesh: what is contracted is summed."""
    hidden = jnp.tanh(_dense(params["a"], x))
    return _dense(params["b"], hidden)


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    kernel, bias = layer["kernel"], layer["bias"]
    sharding = jax.typeof(kernel).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x @ kernel + bias[None]
    out = NamedSharding(sharding.mesh, PartitionSpec("data", sharding.spec[1]))
    return jnp.einsum("ti,io->to", x, kernel, out_sharding=out) + bias[None]


def remember(params: Any, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same layers, of which the first one adds to a state."""
    state = jnp.tanh(_dense(params["a"], x)) + state
    return _dense(params["b"], state), state


def deep(params: Any, x: jax.Array) -> jax.Array:
    """Two residual blocks."""
    for i in range(2):
        x = x + jnp.tanh(x @ params[f"block_{i}"]["kernel"])
    return x


def make_layer(params: Any, k: Any) -> Any:
    """Make masks by exact count."""
    return jaxprune.make_masks(params, k, rule=rules.layer_sparsity)


class Problem:
    """The network with its evidence, each made when it is asked for, under the flags of that time.

    Attributes:
        folder: for files.
        mesh: what the parameters and the data are sharded over; None for one device.
    """

    def __init__(self, folder: Path, mesh: Mesh | None = None) -> None:
        """Put parameters and data in their places."""
        self.folder, self.mesh = folder, mesh
        self.params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), PARAMS)
        self.x = jnp.asarray(X, jnp.float32)
        if mesh is not None:
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
            self.params = jax.tree.map(jax.device_put, self.params, shardings)
            self.x = jax.device_put(self.x, NamedSharding(mesh, PartitionSpec("data", None)))

    @functools.cached_property
    def masks(self) -> Any:
        return make_layer(self.params, 0.5)

    @functools.cached_property
    def pruned(self) -> Any:
        return jaxprune.apply_masks(self.params, self.masks)

    @functools.cached_property
    def grads(self) -> Any:
        return jax.tree.map(lambda w: jnp.sin(3 * w), self.params)

    @functools.cached_property
    def grams(self) -> Any:
        return jaxprune.calibrate_grams(apply, self.params, [self.x])

    @functools.cached_property
    def norms(self) -> Any:
        return jaxprune.calibrate_norms(apply, self.params, [self.x])

    @functools.cached_property
    def sensitivity(self) -> Any:
        return jaxprune.sensitivity(self.loss, self.params, [0.25, 0.5], rule=rules.layer_sparsity)

    @functools.cached_property
    def graph(self) -> Any:
        return structured.trace(apply, self.params, self.x)

    @functools.cached_property
    def plan(self) -> Any:
        return structured.select_channels(self.graph, self.params, 0.5)

    @functools.cached_property
    def prices(self) -> Any:
        squares = jax.tree.map(jnp.square, self.grads)
        return structured.price_widths(self.graph, self.params, grams=self.grams, squares=squares, options=4)

    @functools.cached_property
    def times(self) -> Any:
        return structured.measure_times(self.graph, self.params, self.x, repeats=1, timer=_weights)

    @property
    def macs(self) -> Any:
        return functools.partial(structured.count_macs, self.graph)

    @functools.cached_property
    def remembering(self) -> Any:
        """The graph of a function with state that is passed in and comes back."""
        state = jax.eval_shape(lambda p, x: _dense(p["a"], x), self.params, self.x)
        alone = lambda path: path == "1"  # noqa: E731
        return structured.trace(remember, self.params, self.x, state, prunable_inputs=alone, prunable_outputs=alone)

    @functools.cached_property
    def file(self) -> Path:
        path = self.folder / "model.safetensors"
        jaxprune.save_sparse(path, self.params, self.masks, metadata={"k": "0.5"})
        return path

    @property
    def axes(self) -> Any:
        """New axes."""
        return Figure().subplots()

    def loss(self, params: Any) -> Any:
        """Sum of squares of the weights: a metric that every mask changes."""
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))

    def deep(self) -> tuple[Any, Any, Any]:
        """Parameters, graph and inputs of a network with blocks that may go."""
        square = jnp.asarray(PARAMS["b"]["kernel"], jnp.float32)
        params, x = {f"block_{i}": {"kernel": (i + 1) * square} for i in range(2)}, jnp.ones((2, 8), jnp.float32)
        return params, structured.trace(deep, params, x), x


def _weights(fn: Callable[..., Any], params: Any, *inputs: Any) -> float:
    """The seconds of a call on a device that takes one for each weight."""
    jax.block_until_ready(fn(params, *inputs))
    return float(sum(leaf.size for leaf in jax.tree.leaves(params)))


def _words() -> structured.Plan:
    """Two of six words stay."""
    params, ids = {"table": jnp.ones((6, 2), jnp.float32)}, jnp.array([4, 1], jnp.int32)
    graph = structured.trace(lambda p, ids: p["table"][ids] @ p["table"].T, params, ids)
    return structured.select_rows(graph, "table", keep=ids)


def trained(problem: Problem, tx: optax.GradientTransformation) -> Any:
    """Two steps from the pruned weights."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = problem.pruned, tx.init(problem.pruned)
    for _ in range(2):
        params, state = step(params, state, problem.grads)
    return params


SGD = optax.sgd(0.5)
KEY = 7


def _by_scores(name: str) -> Callable[[Problem], Any]:
    return lambda p: getattr(rules, name)(scores.magnitude(p.params), 0.5)


def _iterate(p: Problem) -> Any:
    return [
        (r.params, r.masks) for r in jaxprune.iterate(lambda params, masks: params, make_layer, p.params, [0.25, 0.5])
    ]


def _distil(p: Problem) -> Any:
    hidden = jnp.stack([p.x, -p.x, p.x], axis=1)  # three tokens in each sequence

    def loss(student: jax.Array) -> jax.Array:
        return distill.logit_loss(student, hidden, lambda h: 2 * h, lambda h: h, mask=hidden[..., 0] > 0, chunk=64)

    return jax.value_and_grad(loss)(jnp.sin(hidden))


def _two_four(p: Problem, size: int) -> Any:
    kernel = p.params["b"]["kernel"]
    mask = jaxprune.make_masks({"kernel": kernel}, 2, rule=rules.n_m(4))["kernel"]
    whole = (np.tile(np.asarray(array), (size // 8, size // 8)) for array in (kernel.astype(jnp.bfloat16), mask))
    return export.to_two_four(*whole)


def _packed(p: Problem) -> Path:
    found = oneshot.gptq(p.params, p.grams, masks=p.masks)
    return export.write_compressed_tensors(p.folder / "packed", found, force=True).path


def _files(p: Problem) -> tuple[Path, Path]:
    return p.file, p.folder / "other.safetensors"


def _onnx(p: Problem) -> Any:
    """Where its library is missing, it says so: `tests/interop/onnx` calls it where there is one."""
    with pytest.raises(ModuleNotFoundError, match="pip install jaxprune jax2onnx"):
        export.save_onnx(p.folder / "model.onnx", apply, p.params, p.x)
    return 0


def _keras(make: Callable[[], Any]) -> str:
    """What needs Keras says so; with it the tests of tests/interop/keras run it."""
    try:
        return make().__class__.__name__
    except ModuleNotFoundError as error:
        return str(error)


def _bundle(p: Problem) -> tuple[storage.Saved, Any]:
    saved = export.save(p.folder / "bundle", apply, p.params, p.x, masks=p.masks, plan=p.plan, force=True)
    return saved, export.load(saved.path)


LLAMA = {"model_type": "llama", "head_dim": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}


def _llama(p: Problem) -> Any:
    """A Llama of one layer, all of whose kernels are the same."""
    kernel, scale = p.params["b"]["kernel"], p.params["b"]["bias"]
    modules = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    layer = {name: {"kernel": kernel} for name in modules} | {
        f"{name}_norm": {"scale": scale} for name in ("attention", "mlp")
    }
    return {"embed": {"embedding": kernel}, "layer_0": layer, "norm": {"scale": scale}}


def _hugging_face(p: Problem) -> Any:
    folder = p.folder / "hugging_face"
    written = export.write_hugging_face(folder, _llama(p), LLAMA, force=True)
    return written, export.read_hugging_face(folder)


def _gguf(p: Problem) -> Any:
    path = p.folder / "model.gguf"
    written = export.write_gguf(path, _llama(p), LLAMA, kind="BF16", force=True)
    return written, export.read_gguf(path)


def _weight_gates(p: Problem) -> Any:
    return learned.weight_gates(p.params, jax.random.key(KEY), prior=p.masks)


def _pattern_gates(p: Problem) -> Any:
    return learned.pattern_gates(p.params, 2, 4, jax.random.key(KEY), prior=p.masks)


def _soft(p: Problem) -> Any:
    return learned.soft_masks(_weight_gates(p), jax.random.key(KEY), 1, steps=2)


def _mixture(params: Any, x: jax.Array) -> jax.Array:
    """Two of four experts for each token."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    routed = jnp.sum(jax.nn.one_hot(experts, 4, dtype=jnp.float32) * weights[..., None], 1)
    return jnp.einsum("te,td,edf->tf", routed, x, params["experts"])


def _experts(p: Problem) -> Any:
    kernel = jnp.asarray(PARAMS["b"]["kernel"], jnp.float32)
    params = {"router": kernel[:4, :4], "experts": jnp.stack([kernel[:4], kernel[4:], -kernel[:4], 2 * kernel[4:]])}
    return structured.trace(_mixture, params, p.x), params


def _select_experts(p: Problem) -> Any:
    graph, params = _experts(p)
    (use,) = structured.expert_use(graph, params, [p.x]).values()
    return structured.select_experts(graph, {graph.groups[0].name: use.reap}, 0.25).to_json()


def _prune_blocks(p: Problem) -> Any:
    data = [np.asarray(apply(p.params, p.x))]
    source = jaxprune.save_sparse(p.folder / "blocks.safetensors", [p.params["b"]["kernel"]] * 2).path
    storage.prune_blocks(
        source,
        p.folder / "pruned.safetensors",
        "{}",
        lambda blocks: oneshot.block_by_block(
            lambda kernel, x: jnp.tanh(x @ kernel), blocks, data, functools.partial(oneshot.sparsegpt, k=0.5)
        ),
    )
    return jaxprune.load_sparse(p.folder / "pruned.safetensors")


# Full name -> the function, called once; what it returns is compared with what it returns without flags, on one device.
CALLS: dict[str, Callable[[Problem], Any]] = {
    "jaxprune.apply_masks": lambda p: jaxprune.apply_masks(p.params, p.masks),
    "jaxprune.calibrate_grams": lambda p: p.grams.sums,
    "jaxprune.calibrate_norms": lambda p: [p.norms.sums, p.grams.norms().sums],
    "jaxprune.export.from_maxtext": lambda p: export.from_maxtext(export.to_maxtext(_llama(p), LLAMA)[0], LLAMA),
    "jaxprune.export.read_gguf": lambda p: _gguf(p)[1],
    "jaxprune.export.read_hugging_face": lambda p: _hugging_face(p)[1],
    "jaxprune.export.to_maxtext": lambda p: export.to_maxtext(_llama(p), LLAMA),
    "jaxprune.export.write_gguf": lambda p: _gguf(p)[0],
    "jaxprune.export.write_hugging_face": lambda p: _hugging_face(p)[0],
    "jaxprune.find_sites": lambda p: [site.path for site in jaxprune.find_sites(apply, p.params, p.x)],
    "jaxprune.is_kernel": lambda p: [jaxprune.is_kernel(f"a/{name}", leaf) for name, leaf in p.params["a"].items()],
    "jaxprune.iterate": _iterate,
    "jaxprune.keep_pruned": lambda p: trained(p, optax.chain(SGD, jaxprune.keep_pruned(p.masks))),
    "jaxprune.load_sparse": lambda p: jaxprune.load_sparse(p.file, like=p.params),
    "jaxprune.make_masks": lambda p: jaxprune.make_masks(p.params, 0.8),
    "jaxprune.masks_in": lambda p: jaxprune.masks_in(jaxprune.keep_pruned(p.masks).init(p.params)),
    "jaxprune.mean_over_batches": lambda p: jaxprune.mean_over_batches(lambda q, x: q, p.params, [p.x, p.x]),
    "jaxprune.prune": lambda p: trained(p, optax.chain(SGD, jaxprune.prune(make_layer, 0.75, every=1, until=1))),
    "jaxprune.recalibrate": lambda p: jaxprune.recalibrate(
        lambda s, x: {"mean": 0.9 * s["mean"] + 0.1 * jnp.mean(x, 0)}, {"mean": jnp.zeros(4, jnp.float32)}, [p.x, p.x]
    ),
    "jaxprune.report": lambda p: jaxprune.report(p.folder / "page.html", p.params, p.masks).prunable.kept,
    "jaxprune.rigl": lambda p: trained(p, jaxprune.rigl(SGD, p.masks, every=1, until=1)),
    "jaxprune.save_sparse": lambda p: jaxprune.save_sparse(p.folder / "saved", p.params, p.masks, quantize=8).bytes,
    "jaxprune.search_k": lambda p: jaxprune.search_k(p.loss, p.params, max_drop=20.0, rule=rules.layer_sparsity, steps=4),
    "jaxprune.sensitivity": lambda p: (p.sensitivity.metric, p.sensitivity.sparsity),
    "jaxprune.sparsity": lambda p: jaxprune.sparsity(p.masks),
    "jaxprune.summarize": lambda p: [row.kept for row in jaxprune.summarize(p.params, p.masks).rows],
    "jaxprune.algebra.count_kept": lambda p: algebra.count_kept(p.masks),
    "jaxprune.algebra.intersect": lambda p: algebra.intersect(p.masks, algebra.invert(p.masks)),
    "jaxprune.algebra.invert": lambda p: algebra.invert(p.masks),
    "jaxprune.algebra.masks_of": lambda p: algebra.masks_of(p.pruned),
    "jaxprune.algebra.overlap": lambda p: algebra.overlap(p.masks, make_layer(p.params, 0.75)),
    "jaxprune.algebra.pack": lambda p: algebra.pack(p.masks),
    "jaxprune.algebra.require_pruned": lambda p: algebra.require_pruned(p.pruned, p.masks),
    "jaxprune.algebra.union": lambda p: algebra.union(p.masks, make_layer(p.params, 0.25)),
    "jaxprune.algebra.unpack": lambda p: algebra.unpack(algebra.pack(p.masks), p.params),
    "jaxprune.choose.allocate": lambda p: choose.allocate(p.sensitivity, 0.25),
    "jaxprune.choose.allocate_by_loss": lambda p: choose.allocate_by_loss(p.params, 0.5, scores=scores.magnitude(p.params)),
    "jaxprune.distill.hidden_loss": lambda p: jax.grad(lambda x: distill.hidden_loss({"x": x}, {"x": 2 * x}))(p.x),
    "jaxprune.distill.logit_loss": _distil,
    "jaxprune.export.load": lambda p: [_bundle(p)[1](p.x), _bundle(p)[1].params],
    "jaxprune.export.save_onnx": _onnx,
    "jaxprune.export.save": lambda p: [row.stored_bytes for row in _bundle(p)[0].tensors],


    "jaxprune.export.pack_cutlass": lambda p: export.pack_cutlass(_two_four(p, 32)),
    "jaxprune.export.pack_tcgen05": lambda p: export.pack_tcgen05(_two_four(p, 128)),
    "jaxprune.export.read_compressed_tensors": lambda p: export.read_compressed_tensors(_packed(p)),
    "jaxprune.export.to_two_four": lambda p: _two_four(p, 8).dense(),
    "jaxprune.export.unpack_cutlass": lambda p: export.unpack_cutlass(
        _two_four(p, 32).values, export.pack_cutlass(_two_four(p, 32))
    ),
    "jaxprune.export.unpack_tcgen05": lambda p: export.unpack_tcgen05(
        _two_four(p, 128).values, export.pack_tcgen05(_two_four(p, 128))
    ),
    "jaxprune.export.write_compressed_tensors": lambda p: (_packed(p) / "model.safetensors").stat().st_size,
    "jaxprune.learned.apply_soft_masks": lambda p: learned.apply_soft_masks(p.params, _soft(p)),
    "jaxprune.learned.kept_norm": lambda p: jax.grad(lambda soft: learned.kept_norm(p.params, soft))(_soft(p)),
    "jaxprune.learned.pattern_gates": _pattern_gates,
    "jaxprune.learned.pattern_masks": lambda p: learned.pattern_masks(_pattern_gates(p), p.params, 2),
    "jaxprune.learned.soft_masks": _soft,
    "jaxprune.learned.soft_patterns": lambda p: learned.soft_patterns(
        _pattern_gates(p), p.params, 2, jax.random.key(KEY), 1, steps=2
    ),
    "jaxprune.learned.sparsity_loss": lambda p: jax.grad(lambda soft: learned.sparsity_loss(soft, 0.9))(_soft(p)),
    "jaxprune.learned.weight_gates": _weight_gates,
    "jaxprune.oneshot.admm": lambda p: oneshot.admm(p.params, p.grams, 0.5, steps=8),
    "jaxprune.oneshot.block_by_block": lambda p: list(
        oneshot.block_by_block(
            lambda kernel, x: x + _dense({"kernel": kernel, "bias": p.params["b"]["bias"]}, x),
            [p.params["b"]["kernel"]] * 2,
            [apply(p.params, p.x)] * 2,
            functools.partial(oneshot.sparsegpt, k=0.5),
        )
    ),
    "jaxprune.oneshot.swap": lambda p: oneshot.swap(p.params, p.masks, p.grams)[:2],
    "jaxprune.oneshot.swap_and_reconstruct": lambda p: oneshot.swap_and_reconstruct(p.params, p.masks, p.grams)[:2],
    "jaxprune.oneshot.reconstruct": lambda p: oneshot.reconstruct(p.params, p.masks, p.grams),
    "jaxprune.oneshot.sequential": lambda p: oneshot.sequential(
        apply, p.params, [p.x, p.x], functools.partial(oneshot.sparsegpt, k=0.5)
    ),
    "jaxprune.oneshot.gptq": lambda p: oneshot.gptq(p.params, p.grams, bits=3, symmetric=False, act_order=True).params,
    "jaxprune.oneshot.prune_and_quantize": lambda p: oneshot.prune_and_quantize(p.params, p.grams, 0.5),
    "jaxprune.oneshot.sparsegpt": lambda p: oneshot.sparsegpt(p.params, p.grams, 0.5),
    "jaxprune.oneshot.synflow_masks": lambda p: oneshot.synflow_masks(apply, p.params, p.x, 0.5, rounds=2),
    "jaxprune.plot.accuracy": lambda p: plot.accuracy([0.0, 0.5], {"a": [1.0, 0.5]}, p.axes).get_ylabel(),
    "jaxprune.plot.churn": lambda p: plot.churn([{"step": 0, "sparsity": 0.5, "churn": 0.1}], p.axes).get_xlabel(),
    "jaxprune.plot.mask": lambda p: plot.mask(p.masks["a"]["kernel"], p.axes).get_xlabel(),
    "jaxprune.plot.sensitivity_curves": lambda p: plot.sensitivity_curves(p.sensitivity, p.axes).get_xlabel(),
    "jaxprune.plot.sparsity_by_layer": lambda p: plot.sparsity_by_layer(
        jaxprune.summarize(p.params, p.masks), p.axes
    ).get_xlabel(),
    "jaxprune.plot.weights": lambda p: plot.weights(p.params["a"]["kernel"], 0.5, p.axes).get_xlabel(),
    **{
        f"jaxprune.rules.{name}": _by_scores(name)
        for name in (
            "absolute_threshold", "erk_sparsity", "global_sparsity", "layer_sparsity", "max_threshold", "mean_threshold",
            "row_sparsity", "std_threshold",
        )
    },
    "jaxprune.rules.as_rule": lambda p: rules.as_rule(make_layer)(scores.magnitude(p.params), 0.5),
    "jaxprune.rules.blocks": lambda p: jaxprune.make_masks(p.params, 0.5, rule=rules.blocks(rules.global_sparsity, (2, 3))),
    "jaxprune.rules.channels": lambda p: jaxprune.make_masks(p.params, 0.5, rule=rules.channels(rules.layer_sparsity)),
    "jaxprune.rules.n_m": lambda p: jaxprune.make_masks(p.params, 2, rule=rules.n_m(4)),
    "jaxprune.scores.batch_norm_scale": lambda p: scores.batch_norm_scale(p.params["a"]["bias"]),
    "jaxprune.scores.channel_norm": lambda p: scores.channel_norm(p.params["a"]["kernel"], 1),
    "jaxprune.scores.fisher": lambda p: scores.fisher(p.params, p.grads),
    "jaxprune.scores.fpgm": lambda p: scores.fpgm(p.params["a"]["kernel"], 1),
    "jaxprune.scores.gradient": lambda p: scores.gradient(p.params, p.grads),
    "jaxprune.scores.grasp": lambda p: scores.grasp(p.loss, p.params),
    "jaxprune.scores.lamp": lambda p: scores.lamp(p.params),
    "jaxprune.scores.magnitude": lambda p: scores.magnitude(p.params),
    "jaxprune.scores.movement": lambda p: scores.movement(p.params, p.grads, previous=scores.movement(p.params, p.grads)),
    "jaxprune.scores.obs": lambda p: scores.obs(p.params, p.grams),
    "jaxprune.scores.random": lambda p: scores.random(p.params, jax.random.key(KEY)),
    "jaxprune.scores.ria": lambda p: scores.ria(p.params, p.norms),
    "jaxprune.scores.saliency": lambda p: scores.saliency(p.params, p.grads),
    "jaxprune.scores.snip": lambda p: scores.snip(p.params, p.grads),
    "jaxprune.scores.synflow": lambda p: scores.synflow(apply, p.params, p.x),
    "jaxprune.scores.wanda": lambda p: scores.wanda(p.params, p.norms),
    "jaxprune.storage.convert_file": lambda p: storage.convert_file(*_files(p), dense=True, force=True).bytes,
    "jaxprune.storage.diff_files": lambda p: storage.diff_files(p.file, p.file),
    "jaxprune.storage.load_codes": lambda p: list(storage.load_codes(p.file)),
    "jaxprune.storage.multiply_bcsr": lambda p: storage.multiply_bcsr(
        p.x, storage.to_bcsr(p.params, p.masks)["a"]["kernel"]
    ),
    "jaxprune.storage.prune_blocks": _prune_blocks,
    "jaxprune.storage.prune_file": lambda p: storage.prune_file(*_files(p), 0.75, rule=rules.layer_sparsity, force=True).bytes,
    "jaxprune.storage.read_metadata": lambda p: storage.read_metadata(p.file),
    "jaxprune.storage.stored_bytes": lambda p: storage.stored_bytes(p.params, p.masks),
    "jaxprune.storage.summarize_file": lambda p: storage.summarize_file(p.file).bytes,
    "jaxprune.storage.to_bcsr": lambda p: jax.tree.leaves(storage.to_bcsr(p.params, p.masks)),
    "jaxprune.structured.allocate_widths": lambda p: [
        structured.allocate_widths(p.graph, p.prices, 2_000).k,
        structured.allocate_widths(p.graph, p.prices, [2_000, 90.0], cost=[p.macs, p.times]).costs,
    ],
    "jaxprune.structured.check_times": lambda p: [p.times.widths, structured.check_times(p.times, p.plan, p.params, p.x, timer=_weights)],
    "jaxprune.structured.channel_masks": lambda p: structured.channel_masks(p.plan, p.params),
    "jaxprune.structured.combine": lambda p: structured.combine(p.plan, p.plan).to_json(),
    "jaxprune.structured.count_bytes": lambda p: structured.count_bytes(p.graph, p.plan),
    "jaxprune.structured.count_macs": lambda p: structured.count_macs(p.graph, p.plan),
    "jaxprune.structured.count_parameters": lambda p: structured.count_parameters(p.graph, p.plan),
    "jaxprune.structured.expert_use": lambda p: structured.expert_use(*_experts(p), [p.x]),
    "jaxprune.structured.group_lasso": lambda p: structured.group_lasso(p.graph, p.params),
    "jaxprune.structured.masked": lambda p: structured.masked(p.graph)(p.params, structured.channel_masks(p.plan, p.params), p.x),
    "jaxprune.structured.measure_blocks": lambda p: structured.measure_blocks(
        p.deep()[1], p.deep()[0], lambda fn, params: jnp.sum(fn(params, p.deep()[2]) ** 2)
    ),
    "jaxprune.structured.measure_times": lambda p: [p.times.widths, p.times.blocks],
    "jaxprune.structured.measure_widths": lambda p: structured.measure_widths(
        p.graph, p.params, lambda fn, params: jnp.sum(fn(params, p.x) ** 2), grams=p.grams, options=2
    ),
    "jaxprune.structured.price_widths": lambda p: p.prices,
    "jaxprune.structured.new_ids": lambda p: structured.new_ids(_words(), jnp.array([4, 1], jnp.int32)),
    "jaxprune.structured.old_ids": lambda p: structured.old_ids(_words(), jnp.array([1, 0], jnp.int32)),
    "jaxprune.structured.rebuild": lambda p: structured.rebuild(p.graph, p.plan)(structured.shrink(p.plan, p.params), p.x),
    "jaxprune.structured.recover": lambda p: structured.recover(
        lambda width: {"w": jnp.zeros((width, 2), jnp.float32)}, {"width": 4}, {"w": jnp.zeros((3, 2), jnp.float32)}
    ),
    "jaxprune.structured.repair": lambda p: structured.repair(p.plan, p.params, p.grams),
    "jaxprune.structured.select_blocks": lambda p: structured.select_blocks(
        p.deep()[1], p.deep()[0], 1, lambda fn, params: jnp.sum(fn(params, p.deep()[2]) ** 2)
    ).to_json(),
    "jaxprune.structured.select_channels": lambda p: [
        p.plan.to_json(),
        structured.select_channels(p.graph, p.params, {"a": 0.5}, grams=p.grams).to_json(),
    ],
    "jaxprune.structured.select_channels_globally": lambda p: [
        structured.select_channels_globally(p.graph, p.params, 2_000, isomorphic=isomorphic).to_json()
        for isomorphic in (False, True)
    ],
    "jaxprune.structured.select_experts": _select_experts,
    "jaxprune.structured.select_in_sequence": lambda p: [
        (plan.to_json(), params)
        for target in ("dense", "current")
        for plan, params in [structured.select_in_sequence(p.graph, p.params, {"a": 0.5}, [p.x], target=target)]
    ],
    "jaxprune.structured.select_rows": lambda p: _words().to_json(),
    "jaxprune.structured.shrink": lambda p: structured.shrink(p.plan, p.params),
    "jaxprune.structured.sparsity_within": lambda p: structured.sparsity_within(p.graph, 2_000),
    "jaxprune.structured.trace": lambda p: str(p.graph),
    "jaxprune.structured.verify": lambda p: structured.verify(p.graph, p.plan, p.params, p.x).passed,
    "jaxprune.structured.verify_module": lambda p: structured.verify_module(p.graph, p.plan, apply, p.params, p.x).passed,
    "jaxprune.structured.with_inputs": lambda p: structured.with_inputs(p.plan, p.remembering).to_json(),
    "jaxprune.transforms.ac_dc_schedule": lambda p: [
        transforms.ac_dc_schedule(0.5, every=2, until=8)(jnp.int32(i)) for i in range(8)
    ],
    "jaxprune.transforms.decay_pruned": lambda p: trained(
        p, optax.chain(SGD, transforms.decay_pruned(make_layer, 0.75, rate=0.5))
    ),
    "jaxprune.transforms.elsa": lambda p: trained(p, transforms.elsa(SGD, make_layer, 0.5, every=1, until=2)),
    "jaxprune.transforms.heal": lambda p: transforms.heal(
        lambda params, x: jnp.mean(apply(params, x) ** 2), p.params, p.masks, [p.x] * 2, SGD
    ),
    "jaxprune.transforms.keep_pruned_in_keras": lambda p: _keras(lambda: transforms.keep_pruned_in_keras(p.masks)),
    "jaxprune.transforms.keep_zeros": lambda p: trained(p, optax.chain(SGD, transforms.keep_zeros())),
    "jaxprune.transforms.merge_lora": lambda p: transforms.merge_lora(
        p.params["b"]["kernel"],
        jnp.ones((8, 2), jnp.float32),
        jnp.ones((2, 8), jnp.float32),
        p.masks["b"]["kernel"],
    ),
    "jaxprune.transforms.prune_in_keras": lambda p: _keras(lambda: transforms.prune_in_keras(make_layer, 0.5)),
    "jaxprune.transforms.prune_and_regrow": lambda p: trained(
        p, optax.chain(SGD, transforms.prune_and_regrow(make_layer, 0.75, every=1, until=1))
    ),
    "jaxprune.transforms.second_moment": lambda p: transforms.second_moment(optax.adam(0.1).init(p.params)),
    "jaxprune.transforms.prune_and_splice": lambda p: trained(
        p, optax.chain(SGD, transforms.prune_and_splice(make_layer, 0.5, back=0.75, until=1))
    ),
    "jaxprune.transforms.prune_by_gradients": lambda p: trained(
        p,
        transforms.prune_by_gradients(
            SGD, lambda params, mean, k: make_layer(mean, k), 0.75, measure=scores.saliency, every=1, until=1
        ),
    ),
    "jaxprune.transforms.soft_threshold": lambda p: transforms.soft_threshold(p.params, 0.0),
    "jaxprune.transforms.sparse_evolution": lambda p: trained(
        p, transforms.sparse_evolution(SGD, p.masks, jax.random.key(KEY), every=1, until=1)
    ),
    "jaxprune.transforms.static_sparse": lambda p: trained(p, transforms.static_sparse(SGD, p.masks)),
    "jaxprune.transforms.straight_through": lambda p: transforms.straight_through(p.params, p.masks),
}  # fmt: skip
