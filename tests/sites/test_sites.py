"""What find_sites sees: axes, sharing, what is not understood; and matrices that go back to where they came from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl

import jaxprune
from jaxprune import rules
from jaxprune.sites._find import find_sites
from jaxprune.sites._pieces import Piece
from jaxprune.sites._views import View, apply_steps, restore_steps, source_axes
from tests.support.graph_zoo import CASES, built, normal, sites_of

# case, path: operation, shape of the matrices, stack axes, in axes, out axes, input axis
TABLE = [
    ("linen_embed", "Embed_0/embedding", "gather", (1, 7, 5), (), (0,), (1,), 0),
    ("linen_attention", "query/kernel", "dot", (1, 6, 8), (), (0,), (1, 2), 0),
    ("linen_attention", "out/kernel", "dot", (1, 8, 6), (), (0, 1), (2,), 1),
    ("linen_dense_general", "kernel", "dot", (1, 15, 12), (), (0, 1), (2, 3), 1),
    ("linen_conv", "kernel", "conv", (1, 24, 5), (), (0, 1, 2), (3,), 2),
    ("linen_conv_grouped", "kernel", "conv", (2, 12, 3), (3,), (0, 1, 2), (3,), 2),
    ("linen_conv_depthwise", "kernel", "conv", (4, 6, 2), (3,), (0, 1), (3,), None),
    ("linen_scan", "Dense_0/kernel", "dot", (3, 4, 7), (0,), (1,), (2,), 1),
    ("nnx_tied", "embedding", "gather", (1, 7, 4), (), (0,), (1,), 0),
    ("equinox_mlp", "layers/0/weight", "dot", (1, 3, 5), (), (1,), (0,), 1),
    ("equinox_conv", "weight", "conv", (2, 18, 3), (0,), (1, 2, 3), (0,), 1),
    ("haiku_mlp", "mlp/~/linear_0/w", "dot", (1, 3, 5), (), (0,), (1,), 0),
    ("experts", "up", "dot", (3, 4, 6), (0,), (1,), (2,), 1),
    ("experts_einsum", "up", "dot", (3, 4, 6), (2,), (0,), (1,), 0),
    ("ragged", "up", "dot", (3, 4, 6), (0,), (1,), (2,), 1),
    ("indexed", "w", "dot", (3, 8, 8), (0,), (1,), (2,), 1),
    ("nested_scans", "w", "dot", (6, 8, 8), (0, 1), (2,), (3,), 2),
    ("fused_split", "qkv", "dot", (1, 4, 6), (), (0,), (1,), 0),
    ("unstacked", "w", "dot", (1, 8, 8), (), (1,), (2,), 1),
    ("concatenated", "d", "dot", (1, 2, 5), (), (0,), (1,), 0),
    ("learned_query", "q", "dot", (1, 4, 5), (), (0,), (1,), 0),
    ("scaled_by_einsum", "w", "dot", (1, 4, 3), (), (0,), (1,), 0),
    ("scaled_by_einsum", "depth", "dot", (3, 2, 1), (1,), (0,), (), 0),
    ("stacked_here", "b", "dot", (1, 4, 3), (), (0,), (1,), 0),
    ("stacked_here", "c", "dot", (1, 4, 2), (), (0,), (1,), 0),
    ("stacked_here", "h", "dot", (1, 3, 2), (), (0,), (1,), 0),
    ("codebooks", "books", "gather", (2, 5, 3), (0,), (1,), (2,), 1),
]


@pytest.mark.parametrize(("name", "path", "operation", "matrices", "stack", "into", "out", "along"), TABLE)
def test_axes(
    name: str, path: str, operation: str, matrices: Any, stack: Any, into: Any, out: Any, along: int | None
) -> None:
    site = sites_of(name).at(path)[0]
    assert (site.operation, site.matrix_shape) == (operation, matrices)
    assert (site.stack_axes, site.in_axes, site.out_axes, site.input_axis) == (stack, into, out, along)


def linear(site: Any, leaf: Any, x: Any) -> np.ndarray:
    return np.asarray(jnp.einsum("nti,nio->nto", x, site.matrices(leaf)))


@pytest.mark.slow
def test_matrices_multiply_as_the_function_does() -> None:
    for name in ("linen_dense_general_swapped", "linen_conv_grouped", "equinox_conv", "experts_einsum", "ragged"):
        case, (site,) = built(name), sites_of(name)
        flat = {"/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(case.params)}  # fmt: skip
        zero_bias = jax.tree.map(lambda leaf: leaf if leaf.shape == site.shape else jnp.zeros_like(leaf), case.params)
        mine = linear(site, flat[site.path], case.met[site.path][0].astype(np.float32))
        theirs = np.asarray(case.fn(zero_bias, *case.inputs))
        # The same numbers, wherever the outputs' axes stand.
        np.testing.assert_allclose(np.sum(np.square(mine)), np.sum(np.square(theirs)), rtol=1e-5)
        np.testing.assert_allclose(np.sort(mine[mine != 0]), np.sort(theirs[theirs != 0]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_matrices_go_back_to_where_they_came_from(name: str) -> None:
    for site in sites_of(name):
        leaf = jnp.arange(np.prod(site.shape), dtype=jnp.int32).reshape(site.shape)
        matrices = site.matrices(leaf)
        assert matrices.shape == site.matrix_shape
        np.testing.assert_array_equal(site.put(leaf, matrices), leaf)
        back = site.put(jnp.full_like(leaf, -1), matrices)
        assert set(np.unique(back)) - {-1} == set(np.unique(matrices))
        assert site.covers == bool((back >= 0).all())
        mask = site.put(jnp.ones(site.shape, bool), jnp.zeros(site.matrix_shape, bool))
        np.testing.assert_array_equal(mask, back < 0)
        assert mask.dtype == bool


@st.composite
def views(draw: Any) -> tuple[tuple[int, ...], View]:
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    view = View(0, shape)
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["transpose", "reshape", "slice", "reverse", "each"]))
        if kind == "transpose":
            view = view.transpose(draw(st.permutations(range(len(view.shape)))))
        elif kind == "reshape":
            left, sizes = int(np.prod(view.shape)), []
            while left > 1 and len(sizes) < 3:
                sizes.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= sizes[-1]
            view = view.reshape([*sizes, left])
        elif kind == "slice" and view.shape:
            start = [draw(st.integers(0, n - 1)) for n in view.shape]
            limit = [draw(st.integers(a + 1, n)) for a, n in zip(start, view.shape, strict=True)]
            view = view.slice(start, limit, [draw(st.integers(1, 2)) for _ in start])
        elif kind == "reverse" and view.shape:
            view = view.reverse([draw(st.integers(0, len(view.shape) - 1))])
        elif kind == "each" and len(view.shape) > 1:
            view = view.each()
    return shape, view


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(views())
def test_any_view_is_restored_and_knows_its_axes(drawn: tuple[tuple[int, ...], View]) -> None:
    shape, view = drawn
    leaf = jnp.arange(np.prod(shape), dtype=jnp.int32).reshape(shape)
    seen = apply_steps(view.steps, leaf)
    assert seen.shape[seen.ndim - len(view.shape) :] == view.shape
    np.testing.assert_array_equal(restore_steps(view.steps, leaf, seen), leaf)
    blank = restore_steps(view.steps, jnp.full_like(leaf, -1), seen)
    assert sorted(np.asarray(blank)[np.asarray(blank) >= 0].tolist()) == sorted(np.asarray(seen).ravel().tolist())
    axes = source_axes(view.steps, shape)
    assert len(axes) == seen.ndim
    for axis, coordinates in enumerate(np.indices(shape)):
        moved = np.asarray(apply_steps(view.steps, jnp.asarray(coordinates)))
        for position in range(moved.ndim):
            varies = (np.diff(moved, axis=position) != 0).any()
            assert not varies or axis in axes[position]


def test_shared_inputs_tied_weights_and_modified_ones() -> None:
    sites = sites_of("used_twice")
    w, v = sites
    assert len(w.groups) == 2
    assert set(v.groups) < set(w.groups)
    assert [site.exact for site in sites_of("modified")] == [False, False, False]


def test_works_on_shapes_alone() -> None:
    case = built("linen_attention")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (case.params, case.inputs))
    found = find_sites(case.fn, shapes[0], *shapes[1])
    assert found == sites_of("linen_attention")
    assert hash(found) == hash(sites_of("linen_attention"))


def test_reads_as_a_table() -> None:
    text = str(sites_of("linen_attention"))
    line = next(line for line in text.splitlines() if line.lstrip("│ ").startswith("query/kernel"))
    assert "6 x 2 x 4" in line
    assert "key/kernel" in line
    assert "query/bias" in text


def test_prunable_goes_by_role() -> None:
    params = {"scale": normal(3, 4), "kernel": normal(2), "table": normal(7, 3)}

    def fn(params: Any, tokens: Any) -> Any:
        x = params["table"][tokens] @ params["scale"]
        return x * jnp.sum(params["kernel"])

    sites = find_sites(fn, params, jnp.zeros(5, jnp.int32))
    assert [path for path, leaf in params.items() if sites.prunable(path, leaf)] == ["scale"]
    assert sites.elementwise == ("kernel",)


# name, function of (parameters, x [2, 5, 4]), shapes of the parameters, which are pruned, which meet data elementwise
ROLES: list[tuple[str, Any, dict[str, Any], str, str]] = [
    ("a scale", lambda p, x: jnp.einsum("btd,d->btd", x, p["s"]) @ p["w"], {"s": (4,), "w": (4, 3)}, "w", "s"),
    ("scales of heads", lambda p, x: jnp.einsum("bthd,hd->bthd", x.reshape(2, 5, 2, 2), p["s"]), {"s": (2, 2)}, "", "s"),
    ("frequencies", lambda p, x: jnp.sin(jnp.einsum("bt,f->btf", x[..., 0], p["f"])), {"f": (6,)}, "", "f"),
    ("an outer product", lambda p, x: jnp.exp(jnp.einsum("btd,dn->btdn", x, p["a"])), {"a": (4, 3)}, "", "a"),
    ("a head of one output", lambda p, x: jnp.einsum("btd,d->bt", x, p["w"]), {"w": (4,)}, "w", ""),
    (
        "a depthwise convolution of one element",
        lambda p, x: lax.conv_general_dilated(
            x, p["s"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
        ),
        {"s": (1, 1, 4)},
        "",
        "s",
    ),
    (
        "a class token and positions",
        lambda p, x: (jnp.concatenate([jnp.tile(p["cls"], (2, 1, 1)), x], 1) + p["pos"][None]) @ p["w"],
        {"cls": (1, 1, 4), "pos": (6, 4), "w": (4, 3)},
        "w",
        "cls pos",
    ),
    ("positions in order", lambda p, x: (x + p["pos"][None, jnp.arange(5)]) @ p["w"], {"pos": (9, 4), "w": (4, 3)}, "w", "pos"),
    ("queries on zeros", lambda p, x: (jnp.zeros((2, 3, 4)) + p["q"]) @ p["w"], {"q": (1, 3, 4), "w": (4, 3)}, "w", "q"),
    ("queries repeated", lambda p, x: jnp.repeat(p["q"], 2, 0) @ p["w"], {"q": (1, 3, 4), "w": (4, 3)}, "w", "q"),
    (
        "queries after a norm",
        lambda p, x: jax.nn.standardize(jnp.broadcast_to(p["q"], (2, 3, 4))) @ p["w"],
        {"q": (1, 3, 4), "w": (4, 3)},
        "w",
        "q",
    ),
    (
        "a constant canvas",
        lambda p, x: lax.conv_general_dilated(
            jnp.tile(p["canvas"], (2, 1, 1)), p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        {"canvas": (1, 5, 4), "w": (3, 4, 2)},
        "w",
        "canvas",
    ),
    ("an entry that data chose", lambda p, x: p["q"][x.argmax()] @ p["w"], {"q": (40, 3, 4), "w": (4, 3)}, "w", "q"),
    ("a norm's codebook", lambda p, x: p["book"][jnp.argmax(x @ p["book"].T, -1)], {"book": (7, 4)}, "", ""),
    ("one-hot rows", lambda p, x: jax.nn.one_hot(jnp.argmax(x, -1), 4) @ p["book"], {"book": (4, 3)}, "", ""),
    ("padded", lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), {"w": (4, 3)}, "w", ""),
    ("stacked and indexed", lambda p, x: x @ jnp.stack([p["v"], p["w"]])[1], {"v": (4, 3), "w": (4, 3)}, "w", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "shapes", "pruned", "elementwise"), [pytest.param(*rest, id=name) for name, *rest in ROLES]
)
def test_roles(fn: Any, shapes: dict[str, Any], pruned: str, elementwise: str) -> None:
    params = {path: normal(*shape) for path, shape in shapes.items()}
    sites = find_sites(fn, params, normal(2, 5, 4))
    assert [path for path, leaf in params.items() if sites.prunable(path, leaf)] == pruned.split()
    assert list(sites.elementwise) == elementwise.split()
    assert not sites.unresolved


@st.composite
def joins(draw: Any) -> tuple[list[int], str, int, list[Any]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    kind = draw(st.sampled_from(["concatenate", "stack"]))
    kinds = st.lists(st.sampled_from(["transpose", "reshape", "slice", "reverse"]), max_size=5)
    return sizes, kind, draw(st.integers(0, 1)), [(kind, draw(st.randoms())) for kind in draw(kinds)]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(joins())
def test_parts_of_what_is_joined_are_followed(drawn: tuple[list[int], str, int, list[Any]]) -> None:
    """Whatever is done to the whole, each piece says which of its entries are its own, and where they stand."""
    sizes, kind, axis, changes = drawn
    sizes = [4] * len(sizes) if kind == "stack" else sizes
    shapes = [(6, size) if axis else (size, 6) for size in sizes]
    leaves = [1000 * (i + 1) + np.arange(np.prod(shape)).reshape(shape) for i, shape in enumerate(shapes)]
    pieces: list[Any] = []
    start = 0
    for i, shape in enumerate(shapes):
        piece = Piece(View(i, shape))
        if kind == "stack":
            piece = piece.reshape(shape, (*shape[:axis], 1, *shape[axis:]))
        pieces.append(piece.within(axis, i if kind == "stack" else start))
        start += shape[axis]
    value = (np.stack if kind == "stack" else np.concatenate)(leaves, axis)
    for name, random in changes:
        shape = value.shape
        if name == "transpose":
            order = random.sample(range(len(shape)), len(shape))
            value, pieces = value.transpose(order), [piece.transpose(order) for piece in pieces]
        elif name == "reverse":
            axes = random.sample(range(len(shape)), random.randint(1, len(shape)))
            value, pieces = np.flip(value, axes), [piece.reverse(axes, shape) for piece in pieces]
        elif name == "slice":
            low = tuple(random.randrange(n) for n in shape)
            high = tuple(random.randint(a + 1, n) for a, n in zip(low, shape, strict=True))
            step = tuple(random.randint(1, 2) for _ in shape)
            value = value[tuple(map(slice, low, high, step))]
            pieces = [piece.slice(low, high, step, value.shape) for piece in pieces]
            pieces = [piece for piece in pieces if piece is not None]
            assert {piece.view.leaf + 1 for piece in pieces} == set(value.ravel() // 1000)
        else:
            left, new = value.size, []
            while left > 1:
                new.append(random.choice([d for d in range(1, left + 1) if left % d == 0]))
                left //= new[-1]
            value, old = value.reshape(new), shape
            pieces = [piece.reshape(old, tuple(new)) for piece in pieces]
            if any(piece is None for piece in pieces):
                return  # it is no part along one axis any more
        for piece in pieces:
            own = np.asarray(apply_steps(piece.view.steps, jnp.asarray(leaves[piece.view.leaf])))
            assert own.shape == piece.view.shape
            place: list[Any] = [slice(None)] * value.ndim
            if piece.axis is not None:
                place[piece.axis] = slice(piece.start, piece.start + own.shape[piece.axis])
            np.testing.assert_array_equal(value[tuple(place)], own)


def test_axes_are_those_of_the_function() -> None:
    sites = sites_of("linen_attention")
    assert sites.axes("query/kernel")[:3] == ((), 0, (1, 2))
    assert sites.axes("out/kernel")[:3] == ((), 1, (2,))
    assert sites.axes("query/bias") is None
    depthwise = built("linen_conv_depthwise")
    sites = find_sites(depthwise.fn, depthwise.params, *depthwise.inputs)
    with pytest.raises(ValueError, match=r"params\['kernel'\] has its inputs along axes \(0, 1.*, not along one axis"):
        jaxprune.make_masks(depthwise.params, 2, rule=rules.n_m(4), sites=sites)


def test_n_m_runs_along_the_inputs_that_the_sites_know() -> None:
    # By its name the leaf looks like a Flax kernel [in, out]; the function contracts the last axis.
    params = {"kernel": jnp.asarray([[1.0, 4.0, 3.0, 2.0], [8.0, 5.0, 6.0, 7.0]])}
    sites = find_sites(lambda p, x: jnp.einsum("oi,bi->bo", p["kernel"], x), params, jnp.zeros((3, 4)))
    masks = jaxprune.make_masks(params, 2, rule=rules.n_m(4), sites=sites)
    assert masks["kernel"].tolist() == [[False, True, True, False], [True, False, False, True]]


# ---- what is not understood


def pallas_product(x: Any, w: Any) -> Any:
    def kernel(x: Any, w: Any, out: Any) -> None:
        out[...] = x[...] @ w[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 2), jnp.float32), interpret=True)(x, w)


def sharded_product(x: Any, w: Any) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(x, w)


# name, function of (x [4, 3], w [3, 2], v [3, 2]), the reason for w
UNRESOLVED = [
    ("multiply and sum", lambda x, w, v: (x[:, :, None] * w[None]).sum(1), "write that as a dot product"),
    ("shard_map", lambda x, w, v: sharded_product(x, w), "it enters shard_map, by which jax.pmap"),
    ("pallas", lambda x, w, v: pallas_product(x, w), "it enters pallas_call together with data"),
    ("product of parameters", lambda x, w, v: x @ (w @ v.T), "it enters dot_general after dot_general"),
    ("broadcast", lambda x, w, v: jnp.einsum("td,tdo->to", x, jnp.broadcast_to(w, (4, 3, 2))), "after broadcast"),
    ("sorted", lambda x, w, v: x @ jnp.sort(w, 0), "it enters dot_general after sort"),
    ("gathered by data", lambda x, w, v: w[x.astype(int), 0], "data chooses its entries in a way"),
    (
        "rows chosen by data multiply data",
        lambda x, w, v: jnp.einsum("to,to->t", w[jnp.argmax(x, 1)], x[:, :2]),
        "entries that data chose multiply data",
    ),
    ("gated by data", lambda x, w, v: (w * x[:3, :2]) @ x[:2], "its elementwise product with data multiplies data"),
    ("condition", lambda x, w, v: lax.while_loop(lambda h: (h @ w).sum() > 1e9, jnp.sin, x), "condition of a while loop"),
    ("stacked by a scan", lambda x, w, v: x @ lax.scan(lambda c, r: (c, 2 * r), 0, w)[1], "after scan"),
    ("chosen between", lambda x, w, v: x @ lax.cond(x[0, 0] > 0, lambda: w, lambda: v), "after cond"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "reason"), [pytest.param(fn, why, id=name) for name, fn, why in UNRESOLVED])
def test_what_is_not_understood_is_listed(fn: Any, reason: str) -> None:
    params = {"w": normal(3, 2), "v": normal(3, 2, salt=1)}
    sites = find_sites(lambda p, x: fn(x, p["w"], p["v"]), params, normal(4, 3))
    reasons = {entry.path: entry.reason for entry in sites.unresolved}
    assert reason in reasons["w"]
    assert not sites.prunable("w", params["w"])


@pytest.mark.slow
def test_every_leaf_is_accounted_for() -> None:
    for name in CASES:
        case, sites = built(name), sites_of(name)
        seen = {site.path for site in sites} | {entry.path for entry in sites.unresolved}
        seen |= set(sites.elementwise) | set(sites.unused)
        assert len(seen) == len(jax.tree.leaves(case.params)), name


def test_a_leaf_without_a_site_is_explained() -> None:
    params = {"w": normal(3, 2), "bias": normal(4, 2), "idle": normal(2, 2), "lora": (normal(3, 1), normal(1, 2))}
    fn = lambda p, x: x @ p["w"] + x @ (p["lora"][0] @ p["lora"][1]) + p["bias"]  # noqa: E731
    sites = find_sites(fn, params, normal(4, 3))
    for path, reason in (
        ("bias", "meets data only elementwise"),
        ("idle", "does not use it with any data"),
        ("lora/0", "enters dot_general after dot_general"),
        ("nowhere", "there is no such leaf"),
    ):
        with pytest.raises(ValueError, match=f"No site multiplies data by '{path}': .*{reason}"):
            sites.at(path)


def test_parameters_of_another_model() -> None:
    sites = find_sites(lambda p, x: x @ p["w"], {"w": normal(3, 2)}, normal(4, 3))
    with pytest.raises(ValueError, match=r"params\['w'\] had shape \(3, 2\) there, but has shape \(3, 5\) here"):
        sites.require_params({"w": normal(3, 5)})
    with pytest.raises(ValueError, match=r"params\['w'\] .* is missing here"):
        sites.require_params({"v": normal(3, 2)})
    with pytest.raises(ValueError, match=r"params\['w'\] has shape \(2, 3\)"):
        sites.sites[0].matrices(normal(2, 3))
    with pytest.raises(ValueError, match=r"seen as matrices of shape \(1, 3, 2\), not \(3, 2\)"):
        sites.sites[0].put(normal(3, 2), normal(3, 2))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_matrices_of_sharded_leaves(kind: Any) -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    spec = jax.sharding.PartitionSpec
    sites = sites_of("linen_attention")
    with jax.set_mesh(mesh):
        site, leaf = sites.at("out/kernel")[0], normal(2, 4, 6)
        sharded = jax.device_put(leaf, jax.NamedSharding(mesh, spec(None, None, None)))
        np.testing.assert_array_equal(site.put(sharded, site.matrices(sharded)), leaf)
        dense = find_sites(lambda p, x: x @ p["w"], {"w": normal(3, 16)}, normal(4, 3)).sites[0]
        sharded = jax.device_put(normal(3, 16), jax.NamedSharding(mesh, spec(None, "d")))
        matrices = dense.matrices(sharded)
        np.testing.assert_array_equal(dense.put(sharded, matrices), sharded)
        assert matrices.sharding.spec[2] == "d"
        assert dense.put(sharded, matrices).sharding.spec == spec(None, "d")
