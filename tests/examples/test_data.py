"""The examples' data: the split, the cache (races, damage), errors within seconds, no TensorFlow."""

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from _support import data
from sklearn.datasets import load_digits
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import tqdm_utils

EXAMPLES = Path(data.__file__).parents[1]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    data.load("digits", folder)
    return folder


def copy_of(prepared: Path, folder: Path) -> Path:
    """Copy the prepared set; returns the folder that holds its files."""
    source, target = prepared / "digits" / "1.0.0", folder / "digits" / "1.0.0"
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def assert_same(actual: data.Dataset, expected: data.Dataset) -> None:
    assert (actual.name, actual.classes) == (expected.name, expected.classes)
    for left, right in zip(actual[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(left, right)


# The digits


def test_digits_has_the_documented_shapes_and_types(prepared: Path) -> None:
    digits = data.load("digits", prepared)
    assert (digits.name, digits.classes) == ("digits", 10)
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_labels.shape == (1437,)
    assert digits.test_labels.shape == (360,)
    assert digits.train_images.dtype == digits.test_images.dtype == np.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0.0, 1.0)


def test_digits_holds_every_image_of_the_source_once_with_its_label(prepared: Path) -> None:
    digits = data.load("digits", prepared)
    images = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64)
    ink = np.rint(images * 16).astype(int)
    assert np.abs(images * 16 - ink).max() <= 16 / 255 / 2 + 1e-6
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    source = load_digits()
    found = np.column_stack([ink, labels]).tolist()
    assert sorted(found) == sorted(np.column_stack([source.data, source.target]).tolist())


def test_digits_split_is_stratified(prepared: Path) -> None:
    digits = data.load("digits", prepared)
    test, whole = np.bincount(digits.test_labels), np.bincount(load_digits().target)
    assert np.abs(test - whole * 360 / 1797).max() < 1


def test_two_builds_are_identical(prepared: Path, tmp_path: Path) -> None:
    assert_same(data.load("digits", tmp_path), data.load("digits", prepared))


def test_a_build_is_silent_leaves_nothing_behind_and_restores_tfds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = downloader.MAX_RETRIES, tqdm_utils._active
    data.load("digits", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "downloads"}
    assert (downloader.MAX_RETRIES, tqdm_utils._active) == before == (10, True)


def test_a_cached_copy_is_read_not_rebuilt(prepared: Path, tmp_path: Path) -> None:
    files = copy_of(prepared, tmp_path)
    before = files.stat().st_ino
    assert_same(data.load("digits", tmp_path), data.load("digits", prepared))
    assert files.stat().st_ino == before


# Where the cache is


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("JAXPRUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert data.cache_dir() == Path("/home/someone/.cache/jaxprune")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert data.cache_dir() == Path("/home/someone/.cache/jaxprune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert data.cache_dir() == Path("/var/cache/someone/jaxprune")
    monkeypatch.setenv("JAXPRUNE_CACHE", "~/elsewhere")
    assert data.cache_dir() == Path("/home/someone/elsewhere")


def test_load_without_a_folder_uses_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, prepared: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path))
    data.load("digits")
    assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").exists()


# Damage


def truncate(files: Path) -> None:
    record = files / "digits-train.array_record-00000-of-00001"
    record.write_bytes(record.read_bytes()[:70_000])


def empty(files: Path) -> None:
    (files / "digits-test.array_record-00000-of-00001").write_bytes(b"")


def flip_a_byte(files: Path) -> None:
    record = files / "digits-train.array_record-00000-of-00001"
    content = bytearray(record.read_bytes())
    content[70_000] ^= 0xFF
    record.write_bytes(content)


def remove_record(files: Path) -> None:
    (files / "digits-train.array_record-00000-of-00001").unlink()


def remove_json(files: Path) -> None:
    (files / "dataset_info.json").unlink()


def garble_json(files: Path) -> None:
    (files / "dataset_info.json").write_text('{"name": "dig')


def remove_all(files: Path) -> None:
    for file in files.iterdir():
        file.unlink()


DAMAGES = [truncate, empty, flip_a_byte, remove_record, remove_json, garble_json, remove_all]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_rebuilt_and_said_in_one_line(
    damage: Callable[[Path], None], prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = copy_of(prepared, tmp_path)
    damage(files)
    rebuilt = data.load("digits", tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"{files} is damaged and is built again (")
    assert err.count("\n") == 1
    assert_same(rebuilt, data.load("digits", prepared))
    assert_same(data.load("digits", tmp_path), rebuilt)
    assert capfd.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "downloads"}


def test_a_copy_in_another_file_format_is_refused_and_kept(prepared: Path, tmp_path: Path) -> None:
    info = copy_of(prepared, tmp_path) / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    kept = info.read_text()
    with pytest.raises(data.DataError, match=r"is prepared as tfrecord.*--data-dir"):
        data.load("digits", tmp_path)
    assert info.read_text() == kept


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match=r"file/cache cannot be written \(Not a directory\).*JAXPRUNE_CACHE"):
        data.load("digits", tmp_path / "file" / "cache")


# Several processes, and what they import

LOAD_WHEN_TOLD = """
import hashlib, sys
from _support import data
print("ready", flush=True)
sys.stdin.readline()
digits = data.load("digits", sys.argv[1])
print(hashlib.sha256(b"".join(array.tobytes() for array in digits[2:])).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, truncate], ids=["missing", "damaged"])
def test_processes_that_build_at_the_same_time_all_succeed(
    damage: Callable[[Path], None] | None, prepared: Path, tmp_path: Path
) -> None:
    if damage:
        damage(copy_of(prepared, tmp_path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD_WHEN_TOLD, str(tmp_path)],
            cwd=EXAMPLES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({digest for digest, _ in results}) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "downloads"}
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
    assert_same(data.load("digits", tmp_path), data.load("digits", prepared))


@pytest.mark.slow
def test_building_and_reading_digits_imports_no_tensorflow(tmp_path: Path) -> None:
    code = """
import sys
from _support import data
data.load("digits", sys.argv[1])
data.load("digits", sys.argv[1])
print(sorted({"tensorflow", "flax", "jax", "torch"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=EXAMPLES, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# Sets of tensorflow-datasets, by name

SHAPES = [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_named_sets_have_their_true_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with tfds.testing.mock_data(num_examples=7):
        dataset = data.load(name, tmp_path)
    assert (dataset.name, dataset.classes) == (name, 10)
    assert dataset.train_images.shape == dataset.test_images.shape == (7, *shape)
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.dtype == np.int32
    assert 0.9 < dataset.train_images.max() <= 1.0
    assert set(dataset.train_labels.tolist()) <= set(range(10))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_preparing_a_named_set_without_tensorflow_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(data.DataError, match=rf"{name} is not prepared.*'tensorflow'.*'jaxprune\[tf\]'"):
        data.load(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


ERRORS = [
    ("mnst", r"unknown data set 'mnst': did you mean mnist"),
    ("", r"unknown data set '': Choose digits, mnist, fashion_mnist, cifar10"),
    ("../digits", r"unknown data set '../digits'"),
    ("huggingface:mnist", r"unknown data set 'huggingface:mnist'"),
    ("imagenette", r"imagenette has images Image\(shape=\(None, None, 3\).*fixed shape"),
    ("ag_news_subset", r"ag_news_subset has the features description, label, title"),
    ("celeb_a", r"celeb_a has the features attributes, identity, image, landmarks"),
]


@pytest.mark.parametrize(("name", "message"), ERRORS)
def test_unknown_and_unsuitable_sets_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=message):
        data.load(name, tmp_path)


# A server that fails: a builder of our own, since those of TFDS need TensorFlow first


class UnreachableImages(tfds.core.GeneratorBasedBuilder):
    """Images that have to be downloaded from `url`."""

    VERSION = tfds.core.Version("1.0.0")
    url = ""

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[object]]:
        return {"train": self._generate_examples(dl_manager.download(self.url))}

    def _generate_examples(self, path: Path) -> Iterator[object]:
        yield 0, {"image": np.zeros((2, 2, 1), np.uint8), "label": 0}


def assert_download_fails(port: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(UnreachableImages, "url", f"http://127.0.0.1:{port}/images.gz")
    with pytest.raises(data.DataError, match=r"could not be downloaded from 127\.0\.0\.1 .*network.*--data-dir"):
        data.load("unreachable_images", folder)
    assert downloader.MAX_RETRIES == 10
    assert [path.name for path in folder.iterdir()] == ["downloads"]


def test_a_closed_port_is_an_error_that_names_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert_download_fails(port, tmp_path, monkeypatch)


def test_a_server_that_answers_503_is_asked_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Unavailable(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert_download_fails(server.server_port, tmp_path, monkeypatch)
        finally:
            server.shutdown()
            thread.join()
    assert asked == ["/images.gz"] * 2


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert_download_fails(silent.getsockname()[1], tmp_path, monkeypatch)


def test_missing_test_split_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = UnreachableImages._generate_examples
    monkeypatch.setattr(
        UnreachableImages, "_split_generators", lambda self, dl_manager: {"train": examples(self, Path())}
    )
    with pytest.raises(data.DataError, match=r"unreachable_images has the splits train; .* train and test"):
        data.load("unreachable_images", tmp_path)


# Batches


@pytest.mark.parametrize(("size", "batch_size", "steps"), [(10, 3, 3), (10, 10, 1), (12, 4, 3), (1, 1, 1)])
def test_epoch_indices_are_a_permutation_cut_to_whole_batches(size: int, batch_size: int, steps: int) -> None:
    indices = data.epoch_indices(size, batch_size, seed=3, epoch=2)
    assert indices.shape == (steps, batch_size)
    assert indices.dtype == np.int32
    flat = indices.ravel().tolist()
    assert len(set(flat)) == steps * batch_size
    assert set(flat) <= set(range(size))


def test_epoch_indices_depend_on_seed_and_epoch_alone() -> None:
    first = data.epoch_indices(50, 5, seed=1, epoch=4)
    np.testing.assert_array_equal(first, data.epoch_indices(50, 5, seed=1, epoch=4))
    assert (first != data.epoch_indices(50, 5, seed=4, epoch=1)).any()
    assert (first != data.epoch_indices(50, 5, seed=1, epoch=5)).any()


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_epoch_indices_need_one_whole_batch(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and the 10 images there are, got {batch_size}"):
        data.epoch_indices(10, batch_size, seed=0, epoch=0)
