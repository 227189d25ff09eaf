"""Models on disk: whole or not at all, pruned and converted one tensor at a time, compared; compressed rows."""

import functools
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage
from jaxprune.storage import StorageError
from jaxprune.storage._container import TensorFile
from tests.support.storage_models import W, random_model, raw, torch_like

# Whole or not at all


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    save_sparse(tmp_path / "m", {"w": W}, force=True)
    before = (tmp_path / "m").read_bytes()
    flat = torch_like()
    flat["layer.1.dense.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(flat, tmp_path / "source")
    with pytest.raises(ValueError, match=r"layer.1.dense.weight holds NaN"):
        storage.convert_file(tmp_path / "source", tmp_path / "m", quantize=8, force=True)
    assert (tmp_path / "m").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]


def test_permissions_and_links_stay(tmp_path):
    target, link = tmp_path / "m", tmp_path / "link"
    save_sparse(target, {"w": W}, force=True)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    link.symlink_to(target)
    save_sparse(link, {"w": 2 * W}, force=True)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert load_sparse(target)[0]["w"].tolist() == (2 * W).tolist()


KILLED = """
import os, signal, sys
import numpy as np
from jaxprune import save_sparse
path, at = sys.argv[1], int(sys.argv[2])
lines = 0
def trace(frame, event, argument):
    global lines
    if "storage" not in frame.f_code.co_filename:
        return None
    lines += 1
    if lines == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return trace
params = {f"w{i}": np.full((40, 50), 2.0 + i, np.float32) for i in range(3)}
sys.settrace(trace)
save_sparse(path, params, {name: (np.arange(2000) % 3 == 0).reshape(40, 50) for name in params}, force=True)
sys.settrace(None)
print(lines)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "m"

    def run(at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", KILLED, str(path), str(at)], capture_output=True, text=True)

    save_sparse(path, {"old": W}, force=True)
    total = int(run(-1).stdout)
    outcomes = set()
    for at in np.linspace(1, total, 8).astype(int):
        save_sparse(path, {"old": W}, force=True)
        assert run(int(at)).returncode == -9
        outcomes.add("/".join(load_sparse(path)[0]))
    assert outcomes == {"old", "w0/w1/w2"}


@pytest.mark.parametrize("gigabytes", [1, 3, 40, 600])
def test_a_file_of_any_size_opens(tmp_path, gigabytes):
    """The file is sparse, so that it takes no space."""
    size = gigabytes * 10**9
    header = {
        "big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [size, size + 8]},
    }
    text = json.dumps(header).encode()
    with (tmp_path / "m").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(size, os.SEEK_CUR)
        file.write(np.float32([1.5, -2.0]).tobytes())
    with TensorFile(tmp_path / "m") as file:
        assert (file.entries["big"].shape, file.entries["big"].size) == ((size // 4,), size)
        assert file.read("small").tolist() == [1.5, -2.0]


# Models on disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "k"),
    [
        (rules.std_threshold, 1.0),
        (rules.layer_sparsity, 0.7),
        (rules.row_sparsity, 0.75),
        (rules.global_sparsity, 0.0),
        (rules.global_sparsity, 0.613),
        (rules.global_sparsity, 1.0),
        (rules.erk_sparsity, 0.7),
        (rules.n_m(4), 2),
    ],
)
@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
def test_a_model_on_disk_is_pruned_as_the_whole_tree_would_be(tmp_path, rule, k):
    flat = torch_like()
    flat["layer.1.dense.weight"] = np.round(4 * flat["layer.1.dense.weight"]) / 4  # ties
    flat["layer.2.dense.weight"][0, :5] = [0.0, -0.0, np.nan, 0.25, -0.25]
    safetensors.numpy.save_file(flat, tmp_path / "source")
    saved = storage.prune_file(tmp_path / "source", tmp_path / "target", k, rule=rule)
    params, masks = load_sparse(tmp_path / "target")
    tree = {name.replace(".", "/"): value for name, value in flat.items()}
    expected = jaxprune.make_masks(tree, k, rule=rule)
    for name, value in flat.items():
        want = np.asarray(expected[name.replace(".", "/")])
        np.testing.assert_array_equal(masks[name], want, err_msg=name)
        np.testing.assert_array_equal(params[name], np.where(want, value, 0), err_msg=name)
    assert [row.kept for row in saved.tensors] == [int(np.sum(masks[name])) for name in sorted(flat)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rules.global_sparsity, rules.erk_sparsity], ids=["global", "erk"])
@pytest.mark.parametrize(("k", "most"), [(0.9, 0.95), (0.7, 0.75), (0.5, 0.9)])
def test_a_rule_with_other_settings_ranks_over_all_tensors_as_on_the_whole_model(rule, k, most, tmp_path):
    """Layers of very different scales: by itself one threshold would empty the first."""
    random = np.random.default_rng(3)
    flat = {f"l{i}.weight": scale * random.normal(size=(24, 16)) for i, scale in enumerate((0.01, 1.0, 3.0))}
    flat = {name: np.round(32 * value).astype(np.float32) for name, value in flat.items()}  # ties, and many zeros
    safetensors.numpy.save_file(flat, tmp_path / "source")
    capped = functools.partial(rule, max_sparsity=most)
    storage.prune_file(tmp_path / "source", tmp_path / "target", k, rule=capped)
    _, masks = load_sparse(tmp_path / "target")
    expected = jaxprune.make_masks({name.replace(".", "/"): value for name, value in flat.items()}, k, rule=capped)
    for name in flat:
        np.testing.assert_array_equal(masks[name], expected[name.replace(".", "/")], err_msg=name)
    gone = [int(np.sum(~masks[name])) for name in flat]
    assert sum(gone) == round(k * 3 * 24 * 16)
    assert max(gone) <= int(most * 24 * 16)


def test_what_no_tensor_by_itself_can_decide_is_refused(tmp_path):
    safetensors.numpy.save_file(torch_like(), tmp_path / "source")
    for rule in (rules.channels(rules.global_sparsity), rules.blocks(rules.erk_sparsity, (2, 2))):
        with pytest.raises(ValueError, match=r"rules\.(channels|blocks)\(.*\) looks at all tensors at once"):
            storage.prune_file(tmp_path / "source", tmp_path / "target", 0.5, rule=rule, force=True)
    with pytest.raises(ValueError, match=r"only .* can \(k <= 0\."):
        storage.prune_file(
            tmp_path / "source", tmp_path / "t", 0.9, rule=functools.partial(rules.global_sparsity, max_sparsity=0.5)
        )
    assert not (tmp_path / "target").exists()


def test_patterns_say_which_tensors_are_pruned(tmp_path):
    safetensors.numpy.save_file({"a.weight": W, "b.weight": W}, tmp_path / "source")
    saved = storage.prune_file(
        tmp_path / "source", tmp_path / "t", 0.5, rule=rules.layer_sparsity, prunable="b.*", force=True
    )
    assert [row.kept < row.size for row in saved.tensors] == [False, True]
    with pytest.raises(ValueError, match=r"prunable='c.\*' matches no tensor; they are named like 'a.weight'"):
        storage.prune_file(tmp_path / "source", tmp_path / "t", 0.5, prunable=["c.*"], force=True)


def test_pruning_again_keeps_what_is_pruned(tmp_path):
    safetensors.numpy.save_file(torch_like(), tmp_path / "source")
    storage.prune_file(tmp_path / "source", tmp_path / "a", 0.5, rule=rules.layer_sparsity, force=True)
    storage.prune_file(tmp_path / "a", tmp_path / "again", 0.9, rule=rules.layer_sparsity)
    storage.prune_file(tmp_path / "source", tmp_path / "b", 0.9, rule=rules.layer_sparsity)
    assert storage.diff_files(tmp_path / "again", tmp_path / "b") == []
    storage.prune_file(tmp_path / "again", tmp_path / "a", 0.1, rule=rules.layer_sparsity, force=True)
    assert storage.diff_files(tmp_path / "a", tmp_path / "b") == []


def shard(folder: Path, flat: dict[str, np.ndarray], count: int) -> None:
    folder.mkdir()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(flat.items())[i::count])
        safetensors.numpy.save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"quantize": 8}, {"compress": True}])
def test_a_folder_of_shards_is_pruned_like_one_file(tmp_path, options):
    flat = torch_like()
    safetensors.numpy.save_file(flat, tmp_path / "file")
    shard(tmp_path / "folder", flat, 3)
    for name in ("file", "folder"):
        storage.prune_file(tmp_path / name, tmp_path / f"{name}-out", 0.6, rule=rules.global_sparsity, **options)
    assert storage.diff_files(tmp_path / "file-out", tmp_path / "folder-out") == []
    assert sorted(path.name for path in (tmp_path / "folder-out").iterdir()) == sorted(
        path.name for path in (tmp_path / "folder").iterdir()
    )
    overview = storage.summarize_file(tmp_path / "folder-out")
    pruned = [row for row in overview.tensors if row.kept < row.size]
    assert sum(row.size - row.kept for row in pruned) == round(0.6 * 3 * 12 * 16)
    assert overview.sparsity == pytest.approx(1 - overview.kept / overview.size)


def test_converting_to_dense_and_back_changes_nothing(tmp_path):
    params, masks = random_model()
    save_sparse(tmp_path / "a", params, masks, metadata={"k": "0.8"})
    storage.convert_file(tmp_path / "a", tmp_path / "b", dense=True, metadata={"note": "dense"})
    assert sorted(raw(tmp_path / "b")) == ["conv/bias", "conv/kernel", "dense/bias", "dense/kernel"]
    np.testing.assert_array_equal(
        raw(tmp_path / "b")["conv/kernel"], np.where(masks["conv"]["kernel"], params["conv"]["kernel"], 0)
    )
    storage.convert_file(tmp_path / "b", tmp_path / "c")
    assert storage.diff_files(tmp_path / "a", tmp_path / "c") == []
    assert (tmp_path / "c").stat().st_size < (tmp_path / "b").stat().st_size
    assert storage.read_metadata(tmp_path / "c") == {"k": "0.8", "note": "dense"}


def test_differences_are_counted_by_hand(tmp_path):
    a = {"w": np.array([[1.0, 2.0, np.nan, 0.0]], np.float32), "old": W, "shape": W}
    b = {"w": np.array([[1.0, 2.5, np.nan, -0.0]], np.float32), "new": W, "shape": W[:1]}
    save_sparse(tmp_path / "a", a, {"w": np.array([[True, True, True, False]]), "old": None, "shape": None})
    save_sparse(tmp_path / "b", b, {"w": np.array([[True, True, True, True]]), "new": None, "shape": None})
    found = storage.diff_files(tmp_path / "a", tmp_path / "b")
    assert [(d.name, d.what, d.different, d.largest) for d in found] == [
        ("new", "only in the second", 4, 0.0),
        ("old", "only in the first", 4, 0.0),
        ("shape", "float32[2, 2] and float32[1, 2]", 4, 0.0),
        ("w", "1 values differ", 1, 0.5),
    ]


def test_an_overview_by_hand(tmp_path):
    params = {"kernel": np.array([[3.0, -1.0], [0.0, 2.0]], np.float32), "bias": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(params, tmp_path / "plain")
    bias, kernel = storage.summarize_file(tmp_path / "plain").tensors
    assert (kernel.kept, kernel.sparsity, kernel.threshold, kernel.stored_bytes) == (3, 0.25, 1.0, 16)
    assert kernel.std == pytest.approx(np.std(params["kernel"]))
    assert (bias.kept, bias.sparsity, bias.threshold) == (2, 0.0, None)  # a bias of zeros is not pruned


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    tensors, shape = 40, (200, 250)
    size = 4 * shape[0] * shape[1]
    rng = np.random.default_rng(0)
    flat = {f"layer.{i}.weight": rng.standard_normal(shape, np.float32) for i in range(tensors)}
    shard(tmp_path / "folder", flat, 2)
    del flat
    for options in ({}, {"dense": True}, {"quantize": 8}, {"compress": True}):
        tracemalloc.start()
        try:
            storage.prune_file(
                tmp_path / "folder", tmp_path / "out", 0.5, rule=rules.global_sparsity, **options, force=True
            )
            storage.summarize_file(tmp_path / "out")
            storage.diff_files(tmp_path / "folder", tmp_path / "out")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Copies, indices of 8 bytes and tables of the ranking for one tensor; never half of the model.
        assert peak < 0.5 * tensors * size, (options, peak / size)


# Compressed rows


@pytest.mark.slow
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (40,)])
def test_compressed_rows_multiply_as_the_masked_matrix_does(batch):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((30, 20), np.float32), "layer": {"weight": rng.standard_normal((20, 30), np.float32)},
              "bias": rng.standard_normal(20, np.float32)}  # fmt: skip
    masks = jaxprune.make_masks(params, 0.9, rule=rules.layer_sparsity)
    sparse = storage.to_bcsr(params, masks)
    masked = jaxprune.apply_masks(params, masks)
    x = rng.standard_normal((*batch, 30), np.float32)
    assert sparse["kernel"].shape == sparse["layer"]["weight"].shape == (20, 30)
    assert sparse["kernel"].nse == sparse["layer"]["weight"].nse == 60
    multiply = jax.jit(storage.multiply_bcsr)
    np.testing.assert_allclose(multiply(x, sparse["kernel"]), x @ masked["kernel"], atol=1e-4)
    np.testing.assert_allclose(multiply(x, sparse["layer"]["weight"]), x @ masked["layer"]["weight"].T, atol=1e-4)
    np.testing.assert_array_equal(sparse["bias"], params["bias"])


def test_compressed_rows_keep_kept_zeros_and_leave_the_rest_dense():
    params = {"kernel": jnp.array([[0.0, 1.0], [2.0, 0.0]]), "conv": jnp.ones((2, 2, 2)), "whole": jnp.ones((2, 2))}
    masks = {"kernel": jnp.array([[True, True], [False, False]]), "conv": jnp.zeros((2, 2, 2), bool), "whole": None}
    sparse = storage.to_bcsr(params, masks)
    assert sparse["kernel"].data.tolist() == [0.0, 1.0]
    assert sparse["kernel"].indptr.tolist() == [0, 1, 2]
    assert sparse["kernel"].indices.ravel().tolist() == [0, 0]
    assert sparse["conv"].tolist() == np.zeros((2, 2, 2)).tolist()
    assert sparse["whole"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="must be the 2 inputs"):
        storage.multiply_bcsr(jnp.ones((4, 3)), sparse["kernel"])
    # A matrix of an einsum may lie either way; kept whole, it need not be known.
    params = {"Einsum_0": {"kernel": jnp.eye(3)}}
    assert storage.to_bcsr(params, {"Einsum_0": {"kernel": None}})["Einsum_0"]["kernel"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"params\['Einsum_0'\]\['kernel'\] of shape \(3, 3\) belongs to an einsum"):
        storage.to_bcsr(params, {"Einsum_0": {"kernel": params["Einsum_0"]["kernel"] != 0}})


def test_storage_errors_are_value_errors():
    assert issubclass(StorageError, ValueError)


def test_a_file_is_pruned_as_the_tree_of_its_names(tmp_path):
    """Which tensors, and along which axes: dotted names in a dict, in nested dicts and in a file are read alike."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (8, 12),
        "model.embed_tokens.weight": (12, 8),
        "h.0.attn.c_attn.weight": (4, 12),  # inputs first, as in GPT-2's files
        "patch_embed.proj.weight": (4, 8, 2, 2),
        "pos_conv_embed.conv.weight_v": (8, 4, 4),
        "pos_conv_embed.conv.weight_g": (1, 1, 4),
        "grn.weight": (1, 1, 1, 8),
        "norm.bias": (8,),
        "lm_head.weight": (12, 8),
    }
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(flat, tmp_path / "source")
    for rule, k in ((rules.n_m(4), 1), (rules.row_sparsity, 0.5), (rules.global_sparsity, 0.5)):
        storage.prune_file(tmp_path / "source", tmp_path / "target", k, rule=rule, force=True)
        _, found = load_sparse(tmp_path / "target")
        expected = jaxprune.make_masks(flat, k, rule=rule)
        assert {name for name, mask in expected.items() if not mask.all()} == {
            *list(shapes)[:1], *list(shapes)[2:5], "lm_head.weight"
        }  # fmt: skip
        for name in shapes:
            np.testing.assert_array_equal(found[name], expected[name])
    nested: dict = {}
    for name, array in flat.items():
        *modules, last = name.split(".")
        within = nested
        for module in modules:
            within = within.setdefault(module, {})
        within[last] = array
    masks = jaxprune.make_masks(nested, 0.5, rule=rules.row_sparsity)
    np.testing.assert_array_equal(masks["h"]["0"]["attn"]["c_attn"]["weight"].sum(0), 2)
    np.testing.assert_array_equal(masks["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"].sum(1), 6)
    # A transposed kernel has its inputs first or second, and is not guessed at.
    safetensors.numpy.save_file({"up.0.up.weight": rng.normal(size=(4, 4, 2, 2))}, tmp_path / "source")
    with pytest.raises(ValueError, match=r"params\['up.0.up.weight'\] of shape .* transposed convolution.*axis="):
        storage.prune_file(tmp_path / "source", tmp_path / "target", 2, rule=rules.n_m(4), force=True)
    storage.prune_file(tmp_path / "source", tmp_path / "target", 2, rule=rules.n_m(4, axis=0), force=True)


def test_large_tensors_are_looked_at_in_pieces(tmp_path):
    """Several pieces, the differences in the last ones; and no copy of the whole in float64."""
    values = np.random.default_rng(0).standard_normal((8_000, 1_000), np.float32) + 100
    other = values.copy()
    other[7_999, 5:8] += np.float32([0.5, -2.0, 1.0])
    other[7_050, 0] = np.nan
    save_sparse(tmp_path / "a", {"w": values})
    save_sparse(tmp_path / "b", {"w": other}, force=True)
    tracemalloc.start()
    try:
        overview = storage.summarize_file(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert overview.tensors[0].std == pytest.approx(values.astype(np.float64).std(), rel=1e-9)
    (found,) = storage.diff_files(tmp_path / "a", tmp_path / "b")
    assert (found.name, found.what) == ("w", "4 values differ")
    assert np.isnan(found.largest)
    other[7_050, 0] = values[7_050, 0]
    save_sparse(tmp_path / "b", {"w": other}, force=True)
    (found,) = storage.diff_files(tmp_path / "a", tmp_path / "b")
    assert (found.what, found.largest) == ("3 values differ", pytest.approx(2.0, rel=1e-4))
    masks = {"w": values > 100}
    save_sparse(tmp_path / "c", {"w": values}, masks)
    assert storage.summarize_file(tmp_path / "c").tensors[0].threshold == values[masks["w"]].min()
    assert peak < 2 * values.nbytes
