"""MNIST's 10,000 test images, read from a folder: nothing of them is part of this project."""

import gzip
from pathlib import Path

import numpy as np

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images, uint8 ``[n, 28, 28, 1]``, and their labels, int32 ``[n]``, in the order of the files."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)
        for name, header in ((IMAGES, 16), (LABELS, 8))
    )
    return pixels.reshape(-1, 28, 28, 1), labels.astype(np.int32)
