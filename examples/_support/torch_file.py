"""Read the arrays in a file of ``torch.save`` without torch, and without running anything that the file names."""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a state dict by name.

    The pickle inside may build dicts and arrays of numbers and nothing else.

    Args:
      path: the file, a zip archive as ``torch.save`` writes it.

    Returns:
      Arrays, in the order of the file.

    Raises:
      pickle.UnpicklingError: the file asks for anything else.
      zipfile.BadZipFile: it is no such archive.
    """
    with zipfile.ZipFile(path) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(index) as file:
            found = _Unpickler(file, archive, index.removesuffix("data.pkl")).load()
    return {str(name): array for name, array in found.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is neither a dict nor an array")

    def persistent_load(self, saved: Any) -> np.ndarray:
        kind, dtype, key, *_ = saved
        if kind != "storage" or dtype not in _DTYPES or not str(key).isalnum():
            raise pickle.UnpicklingError(f"the file asks for {saved!r:.80}, which is not the storage of an array")
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), _DTYPES[dtype])


def _rebuild(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any) -> Any:
    size = int(np.prod(shape))
    contiguous = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
    if size and any(n > 1 and a != b for n, a, b in zip(shape, strides, contiguous, strict=True)):
        raise pickle.UnpicklingError(f"an array of shape {shape} has strides {strides}; only rows in order can be read")
    if not 0 <= offset <= offset + size <= storage.size:
        raise pickle.UnpicklingError(f"an array of shape {shape} reaches beyond its {storage.size} numbers")
    return storage[offset : offset + size].reshape(shape)
