"""Image data sets by name: read from a cache, prepared once, always through tensorflow-datasets.

`digits` (the builder in `examples/digits.py`) needs neither a network nor TensorFlow. The sets that
tensorflow-datasets downloads (`mnist`, `fashion_mnist`, `cifar10`, ...) need both to be prepared, and
neither to be read again. Nothing is ever replaced by other data: what cannot be had is a `DataError`.
"""

import contextlib
import difflib
import errno
import importlib.util
import io
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import tensorflow_datasets as tfds

import _support.digits  # noqa: F401  registers the builder

# TFDS's default, tfrecord, needs TensorFlow to be read; parquet drops records there.
FILE_FORMAT = "array_record"
CONNECT_SECONDS, READ_SECONDS = 4.0, 30.0


class DataError(RuntimeError):
    """A data set that is unknown, unsuitable, or cannot be prepared here; the message says what to do."""


class Dataset(NamedTuple):
    """An image classification data set in memory.

    `train_images` and `test_images` are float32 `[N, H, W, C]` in [0, 1], `train_labels` and `test_labels`
    int32 `[N]` in [0, classes).
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a data set by its tensorflow-datasets name, preparing it in the cache the first time.

    A copy in the cache is read as it is. A missing or damaged one is built in a private folder beside it,
    read from there, and moved into place in one step, so any number of processes may do so at once: a builder
    gives all of them the same data, and the first to finish leaves its copy. A damaged copy is announced in
    one line on stderr.

    Args:
      name: `digits`, `mnist`, `fashion_mnist`, `cifar10`, or another set with images of one fixed shape in
        `image`, classes in `label`, and the splits `train` and `test`.
      data_dir: the cache folder; `cache_dir()` when None. A folder of TFDS's own works if its sets were
        prepared as array_record.

    Returns:
      The whole data set, in the order in which TFDS stores it, the same on every machine.

    Raises:
      DataError: the name is unknown, the set is not of that kind, TensorFlow or the network is needed and
        missing (known within seconds), or the cache folder cannot be written.
    """
    builder_class = _builder_class(name)
    root = Path(data_dir).expanduser() if data_dir is not None else cache_dir()
    with _quiet_absl():
        try:
            return _read(name, root)
        except DataError:
            raise
        except Exception as error:  # missing, truncated, garbled: TFDS has no common error for them
            problem = error
        bundled = not builder_class.__module__.startswith("tensorflow_datasets.")
        return _build(name, root, problem, bundled=bundled)


def cache_dir() -> Path:
    """Return the folder for prepared data: `$JAXPRUNE_CACHE`, else `jaxprune` in the user's cache folder.

    The user's cache folder is `$XDG_CACHE_HOME` if that is an absolute path, else `~/.cache`.
    """
    if chosen := os.environ.get("JAXPRUNE_CACHE"):
        return Path(chosen).expanduser()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (user_cache if user_cache.is_absolute() else Path.home() / ".cache") / "jaxprune"


def epoch_indices(size: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the batches of one epoch as indices, to be scanned over under jit with `images[indices]`.

    Depends on the arguments alone, so a resumed run sees the batches that the uninterrupted one would have
    seen. No index occurs twice; `size % batch_size` of them, others in every epoch, are left out.

    Args:
      size: the number of images, at least `batch_size`.
      batch_size: images per batch, at least 1.
      seed: the run's seed, at least 0.
      epoch: the epoch's number, at least 0.

    Returns:
      int32 `[size // batch_size, batch_size]`, in random order.

    Raises:
      ValueError: not even one batch can be filled.

    >>> epoch_indices(10, 3, seed=0, epoch=0).shape
    (3, 3)
    """
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must lie between 1 and the {size} images there are, got {batch_size}.")
    steps = size // batch_size
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    return order[: steps * batch_size].reshape(steps, batch_size)


def _builder_class(name: str) -> Any:
    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise DataError(
            f"unknown data set {name!r}: {hint}Choose digits, mnist, fashion_mnist, cifar10, or another "
            "image classification set of tensorflow-datasets."
        )
    return tfds.builder_cls(name)


def _read(name: str, root: Path) -> Dataset:
    def source(split: str) -> Any:
        return tfds.data_source(
            name, split=split, data_dir=root, download=False, builder_kwargs={"file_format": FILE_FORMAT}
        )

    train = source("train")
    info = train.dataset_info
    _check_features(name, info.features)
    if info.splits and "test" not in info.splits:
        raise DataError(f"{name} has the splits {', '.join(info.splits)}; the examples need train and test.")
    classes = info.features["label"].num_classes
    return Dataset(name, classes, *_arrays(train, classes), *_arrays(source("test"), classes))


def _arrays(source: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    records = list(source)
    images = np.stack([record["image"] for record in records])
    labels = np.array([record["label"] for record in records], np.int32)
    if not np.all((labels >= 0) & (labels < classes)):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}")
    return np.divide(images, np.float32(np.iinfo(images.dtype).max), dtype=np.float32), labels


def _check_features(name: str, features: Any) -> None:
    needed = "the examples need integer images of one fixed shape in `image` and classes in `label`"
    keys = sorted(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in keys or "label" not in keys:
        raise DataError(f"{name} has the features {', '.join(keys) or features}; {needed}.")
    image, label = features["image"], features["label"]
    fixed = image.shape is not None and len(image.shape) == 3 and None not in image.shape
    if not (fixed and np.issubdtype(image.np_dtype, np.integer)):
        raise DataError(f"{name} has images {image}; {needed}.")
    if not isinstance(label, tfds.features.ClassLabel):
        raise DataError(f"{name} has labels {label}; {needed}.")


def _build(name: str, root: Path, problem: Exception, *, bundled: bool) -> Dataset:
    try:
        root.mkdir(parents=True, exist_ok=True)
        workspace = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root)
    except OSError as error:
        raise DataError(
            f"the data folder {root} cannot be written ({error.strerror}). Choose another with --data-dir or "
            "the environment variable JAXPRUNE_CACHE."
        ) from error
    with workspace as private:
        try:
            builder = tfds.builder(name, data_dir=private, file_format=FILE_FORMAT)
            _check_features(name, builder.info.features)
            fresh = Path(builder.data_dir)
            target = root / fresh.relative_to(private)
            damaged = target.exists()
            if damaged:
                _check_format(target)
                summary = " ".join(f"{type(problem).__name__}: {problem}".split())[:120]
                print(f"{target} is damaged and is built again ({summary})", file=sys.stderr)
            if not bundled and importlib.util.find_spec("tensorflow") is None:
                raise ModuleNotFoundError("No module named 'tensorflow'")
            _prepare(name, builder, root / "downloads", show_progress=not bundled)
        except ModuleNotFoundError as error:
            module = str(error).rpartition("No module named ")[2]
            raise DataError(
                f"{name} is not prepared in {root}, and preparing it needs the module {module}: pip install "
                f"'jaxprune[{'examples' if bundled else 'tf'}]'. The data set digits needs no TensorFlow."
            ) from error
        dataset = _read(name, Path(private))
        _publish(fresh, target, replace=damaged)
    return dataset


def _check_format(target: Path) -> None:
    """Refuse to replace a sound copy that someone prepared in another file format."""
    try:
        file_format = json.loads((target / "dataset_info.json").read_text())["fileFormat"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if file_format != FILE_FORMAT:
        raise DataError(
            f"{target} is prepared as {file_format}, which cannot be read without TensorFlow; the examples "
            f"read {FILE_FORMAT}. Choose another folder with --data-dir."
        )


def _prepare(name: str, builder: tfds.core.DatasetBuilder, downloads: Path, *, show_progress: bool) -> None:
    import requests

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with _impatient_downloads(), _progress_bars(show_progress), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except (requests.RequestException, URLError, tfds.download.DownloadError) as error:
        found = re.search(r"(?:host='|://)([^'/:]+)", str(error))
        raise DataError(
            f"{name} could not be downloaded from {found[1] if found else 'its server'} "
            f"({type(error).__name__}). Check the network or the proxy (HTTPS_PROXY), or prepare it as "
            f"{FILE_FORMAT} on a connected machine and name its folder with --data-dir. The data set digits "
            "needs no network."
        ) from error


def _publish(fresh: Path, target: Path, *, replace: bool) -> None:
    """Move a folder into place in one step; where another process was faster, its copy stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if replace:
        with contextlib.suppress(FileNotFoundError):
            target.rename(fresh.with_name("replaced"))
    try:
        fresh.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


@contextlib.contextmanager
def _swapped(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    saved = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, saved)


@contextlib.contextmanager
def _impatient_downloads() -> Iterator[None]:
    """TFDS tries a silent host ten times, without a time limit: here once more, with one."""
    import requests
    from tensorflow_datasets.core.download import downloader

    send = requests.adapters.HTTPAdapter.send

    def send_with_limit(self: Any, request: Any, timeout: Any = None, **rest: Any) -> Any:
        return send(self, request, timeout=timeout or (CONNECT_SECONDS, READ_SECONDS), **rest)

    with (
        _swapped(downloader, "MAX_RETRIES", 1),
        _swapped(requests.adapters.HTTPAdapter, "send", send_with_limit),
    ):
        yield


def _progress_bars(shown: bool) -> contextlib.AbstractContextManager[None]:
    from tensorflow_datasets.core.utils import tqdm_utils

    return contextlib.nullcontext() if shown else _swapped(tqdm_utils, "_active", False)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """TFDS warns through absl of every folder that it looks for and does not find."""
    logger = logging.getLogger("absl")
    saved = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(saved)
