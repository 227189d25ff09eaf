"""Files that are damaged or hostile: one clear error that names the file and the tensor, and no absurd allocation."""

import functools
import json
import random
import tempfile
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage
from jaxprune.storage import StorageError


def container(header, data: bytes = b"", length: int | None = None) -> bytes:
    """Put a safetensors file together; the header may be an object or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def tensors(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """Put a well-formed file together, of any arrays."""
    dtypes = {"float32": "F32", "int64": "I64", "uint8": "U8", "int8": "I8", "bool": "BOOL", "float16": "F16"}
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, array in arrays.items():
        offsets = (len(data), len(data) + array.nbytes)
        header[name] = entry(dtypes[str(array.dtype)], array.shape, offsets)
        data += array.tobytes()
    return container(header, data)


FLOATS = b"\0\0\x80\x3f" * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole safetensors file: 0 bytes"),
        (b"\x10\0\0", "no whole safetensors file: 3 bytes"),
        (container({}, length=3), "no whole safetensors file"),
        (container(b"{}", length=2**63), "with a header of 9,223,372,036,854,775,808"),
        (container(b"not json"), "header that is not JSON"),
        (container(b"\xff\xfe"), "header that is not JSON"),
        (container(b"[" * 100_000), "header that is not JSON"),
        (container(b'{"a":NaN}'), "NaN is no JSON"),
        (container(b'{"a":' + b"9" * 5_000 + b"}"), "header that is not JSON"),
        (container([1, 2]), "not a JSON object"),
        (container(b'{"a":1,"a":1}'), "'a' stands there twice"),
        (container({"__metadata__": {"k": 1}}), "__metadata__"),
        (container({"__metadata__": "k"}), "__metadata__"),
        (container({"a": 1}), "tensor 'a' has an entry that is not exactly"),
        (container({"a": {**entry(), "more": 1}}, FLOATS), "tensor 'a' has an entry that is not exactly"),
        (container({"a": entry("F33")}, FLOATS), "tensor 'a' has the dtype 'F33'"),
        (container({"a": entry(["F32"])}, FLOATS), "tensor 'a' has the dtype"),
        (container({"a": entry("F4")}, FLOATS), "tensor 'a' has the dtype 'F4'"),
        (container({"a": entry(shape=(-2,))}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": entry(shape=(2.0,))}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": entry(shape=(True, 2))}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": {**entry(), "shape": 2}}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": entry(shape=[1] * 40 + [2])}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}), "tensor 'a' has the shape"),
        (container({"a": entry(shape=(2**62,))}, FLOATS), "tensor 'a' has the shape"),
        (container({"a": entry(shape=(2**40,))}, FLOATS), "tensor 'a' has 8 bytes where F32"),
        (container({"a": entry(offsets=(0,))}, FLOATS), "tensor 'a' has the data_offsets"),
        (container({"a": entry(offsets=(0, "8"))}, FLOATS), "tensor 'a' has the data_offsets"),
        (container({"a": entry(offsets=(8, 0))}, FLOATS), "tensor 'a' has -8 bytes"),
        (container({"a": entry(offsets=(8, 16))}, 2 * FLOATS), "tensor 'a' begins at byte"),
        (container({"a": entry(), "b": entry(offsets=(4, 12))}, 2 * FLOATS), "tensor 'b' begins at byte"),
        (container({"a": entry(), "b": entry()}, FLOATS), "tensor 'b' begins at byte"),
        (container({"a": entry()}, FLOATS[:-1]), "its header describes"),
        (container({"a": entry()}, FLOATS + b"\0"), "its header describes"),
        (container({"a": entry("BOOL", (8,))}, FLOATS), "tensor 'a' is BOOL, but has bytes other than 0 and 1"),
        (container({"../../etc/passwd": entry()}, FLOATS), "'../../etc/passwd' has a name like a file's path"),
        (container({"/etc/passwd": entry()}, FLOATS), "'/etc/passwd' has a name like a file's path"),
        (container({"a//b": entry()}, FLOATS), "'a//b' has a name like a file's path"),
        (container({"a\x1b[2Jb": entry()}, FLOATS), "cannot be printed"),
        (container({"/".join("a" * 100): entry()}, FLOATS), "a name of 100 parts"),
        (container({"a": entry(), "a/b": entry(offsets=(8, 16))}, 2 * FLOATS), "'a/b' lies inside another tensor, 'a'"),
        (container({"": entry(), "b": entry(offsets=(8, 16))}, 2 * FLOATS), "has no name"),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 40, "cannot be decompressed|no whole safetensors"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_in_words(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=message) as raised:
        load_sparse(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


GOOD = {
    "w.shape": np.array([2, 9]),
    "w.compressed": np.array([2.0, 9.0, 1.0], np.float32),
    "w.bitmask": np.array([[2, 1], [1, 0]], np.uint8),
    "w.row_offsets": np.array([0, 2]),
}


def test_the_file_that_the_next_test_damages_is_whole(tmp_path):
    (tmp_path / "m").write_bytes(tensors(GOOD))
    params, masks = load_sparse(tmp_path / "m")
    expected = np.zeros((2, 9))
    expected[0, 1], expected[0, 8], expected[1, 0] = 2, 9, 1
    np.testing.assert_array_equal(params["w.weight"], expected)
    np.testing.assert_array_equal(masks["w.weight"], expected != 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w.bitmask": None}, "'w.compressed' stands without 'w.shape' and 'w.bitmask'"),
        ({"w.shape": None}, "'w.compressed' stands without"),
        ({"w.compressed": None}, "'w.bitmask' stands without 'w.compressed'|'w.row_offsets' stands without"),
        ({"w.compressed": np.ones(4, np.float32)}, r"'w.weight' keeps 3 weights, but holds values of float32\[4\]"),
        ({"w.bitmask": np.array([[2, 1], [3, 0]], np.uint8), "w.row_offsets": None}, "'w.weight' keeps 4 weights"),
        ({"w.bitmask": np.array([[2, 2], [1, 0]], np.uint8)}, "bits beyond the end of a row"),
        ({"w.bitmask": np.array([2, 1, 1, 0], np.uint8)}, r"a bitmask of uint8\[4\], where its shape \[2, 9\] takes"),
        ({"w.bitmask": np.array([[2, 1], [1, 0]], np.int8)}, "a bitmask of int8"),
        ({"w.row_offsets": np.array([0, 1])}, "row_offsets that disagree"),
        ({"w.row_offsets": np.array([0.0], np.float32)}, "row_offsets that disagree"),
        ({"w.shape": np.array([2.0, 9.0], np.float32)}, "a shape that is float32"),
        ({"w.shape": np.array([[2, 9]])}, "a shape that is int64"),
        ({"w.shape": np.array([-2, 9])}, r"has the shape \[-2, 9\], which no array has"),
        ({"w.shape": np.array([2**40, 2**40])}, "which no array has"),
        ({"w.shape": np.array([2**40, 9])}, "a bitmask of uint8"),
        ({"w.shape": np.ones(40, np.int64)}, "which no array has"),
        ({"w.scale": np.ones((1, 9), np.float32)}, "codes of float32 and a scale of float32"),
        ({"w.scale": np.ones((1, 8), np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones(9, np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones((1, 4), np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),  # 9 in threes
        ({"w.scale": np.ones((1, 0), np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones((1, 18), np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones((3, 9), np.float32), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones((1, 9), np.int8), "w.compressed": np.ones(3, np.int8)}, "do not fit"),
        ({"w.scale": np.ones((1, 9), np.float32), "w.compressed": np.ones(3, np.uint8)}, "keeps 3 weights, but holds"),
        ({"w.weight": np.ones(3, np.float32)}, "is there twice"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path, changes, message):
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    (tmp_path / "m").write_bytes(tensors(arrays))
    with pytest.raises(StorageError, match=message):
        load_sparse(tmp_path / "m")


@pytest.mark.parametrize("record", ["not json", "[]", '{"weights": 3}', "[" * 10_000])
def test_an_own_record_that_cannot_be_read_is_an_error(tmp_path, record):
    (tmp_path / "m").write_bytes(tensors(GOOD, {"jaxprune": record}))
    with pytest.raises(StorageError, match="metadata entry 'jaxprune'"):
        load_sparse(tmp_path / "m")


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "m")


# Shards


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "has no weight_map"),
        (b"[]", "has no weight_map"),
        (b"{}", "has no weight_map"),
        (b"[" * 100_000, "has no weight_map"),
        (b'{"weight_map": []}', "empty or not an object"),
        (b'{"weight_map": {"a": "../m.safetensors"}}', "not a .* file name"),
        (b'{"weight_map": {"a": "/m.safetensors"}}', "not a .* file name"),
        (b'{"weight_map": {"a": "m.pickle"}}', "not a .* file name"),
        (b'{"weight_map": {"a": 3}}', "not a .* file name"),
        (b'{"weight_map": {"a": "n.safetensors"}}', "names 'n.safetensors', which is not in the folder"),
        (b'{"weight_map": {"b": "m.safetensors"}}', "tensor 'a' is in None, but it is in m.safetensors"),
        (b'{"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}', "tensor 'b' is in m.safetensors, but it is in None"),
    ],
)  # fmt: skip
def test_a_bad_index_is_refused(tmp_path, index, message):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "m.safetensors").write_bytes(tensors({"a": np.ones(2, np.float32)}))
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(StorageError, match=message):
        storage.summarize_file(folder)


def test_a_folder_without_a_model_and_one_with_a_tensor_twice_are_refused(tmp_path):
    with pytest.raises(StorageError, match="without"):
        storage.summarize_file(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(tensors({"w": np.ones(2, np.float32)}))
    with pytest.raises(StorageError, match="'w' is in another shard as well"):
        storage.summarize_file(tmp_path)


# Fuzzed; benchmarks/storage_hardness.py takes many more


@functools.cache
def good_file(quantize: int | None, group_size: int | None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return a_model(Path(folder), quantize=quantize, group_size=group_size)


def a_model(folder: Path, **options) -> bytes:
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((6, 11), np.float32)}, "b": rng.standard_normal(3).astype(np.float16)}
    save_sparse(folder / "good", params, jaxprune.make_masks(params, 0.6, rule=rules.layer_sparsity), **options)
    return (folder / "good").read_bytes()


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_damaged_file_loads_or_is_refused_in_little_memory(tmp_path, data):
    content = bytearray(good_file(*data.draw(st.sampled_from([(None, None), (8, None), (4, None), (4, 4)]))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        action = data.draw(st.sampled_from(["set", "digit", "delete", "repeat", "truncate"]))
        if action == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif action == "digit":
            digits = [i for i, byte in enumerate(content[:600]) if 48 <= byte < 58]
            content[data.draw(st.sampled_from(digits or [place]))] = data.draw(st.integers(48, 57))
        elif action == "delete":
            del content[place : place + data.draw(st.integers(1, 9))]
        elif action == "repeat":
            content[place:place] = content[place : place + 8]
        else:
            del content[place:]
        if not content:
            break
    (tmp_path / "bad").write_bytes(content)
    tracemalloc.start()
    try:
        load_sparse(tmp_path / "bad")
    except StorageError as error:
        assert str(tmp_path / "bad") in str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


def test_a_damaged_compressed_file_is_refused_or_loads_the_same(tmp_path):
    pytest.importorskip("zstandard")
    good = a_model(tmp_path, compress=True)
    expected = jax.tree.leaves(load_sparse(tmp_path / "good"))
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        content = bytearray(good)
        place = rng.randrange(len(content))
        if rng.random() < 0.3:
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        (tmp_path / "bad").write_bytes(content)
        try:
            found = load_sparse(tmp_path / "bad")
        except StorageError:
            refused += 1
            continue
        # A checksum guards the content; a few bits of the frame around it do not matter.
        for got, want in zip(jax.tree.leaves(found), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    assert refused > 250


def test_a_compressed_file_that_expands_without_end_is_stopped(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    size = 2**28
    header = container({"a": entry(shape=(size // 4,), offsets=(0, size))})
    frame = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / "bomb", "wb") as file:
        file.write(frame.compress(header))
        for _ in range(size // 2**20):
            file.write(frame.compress(bytes(2**20)))
        file.write(frame.flush())
    assert (tmp_path / "bomb").stat().st_size < 2**16
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match="expands to more than 67,108,864 bytes"):
            load_sparse(tmp_path / "bomb")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**24
