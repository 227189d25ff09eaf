"""The integers of a file, as they lie there."""

import os

import jax.numpy as jnp
import numpy as np

from jaxprune.oneshot import Codes
from jaxprune.storage._checkpoint import Checkpoint


def load_codes(path: str | os.PathLike[str]) -> dict[str, Codes]:
    """Load the integers that stand for the weights of a file, which `load_sparse` turns into values.

    Args:
        path: a file of `save_sparse`, or a folder of shards.

    Returns:
        By path, the codes of every leaf that is stored as integers, bit for bit those that `save_sparse` was given: a pruned weight
        has the code `zero_point`. Codes of 5 to 7 bits, which take a byte each, count as 8.

    Raises:
        StorageError: the file is damaged or is no such file; a subclass of ValueError.

    >>> import jax.numpy as jnp, jaxprune, tempfile
    >>> params = {"kernel": jnp.array([[-3.0, 0.5], [7.0, 3.5]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = jaxprune.save_sparse(folder + "/model.safetensors", params, quantize=4)
    ...     codes = load_codes(folder + "/model.safetensors")
    >>> codes["kernel"].codes.tolist(), codes["kernel"].scale.tolist()
    ([[-3, 1], [7, 7]], [[1.0, 0.5]])
    """
    found = {}
    with Checkpoint(path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            codes = tensor.codes(tensor.load()[1])
            if codes is not None:
                scale = jnp.asarray(np.asarray(codes.scale).astype(np.float32))
                found[name] = Codes(jnp.asarray(codes.codes), scale, jnp.asarray(codes.zero_point), codes.bits)
    return found
