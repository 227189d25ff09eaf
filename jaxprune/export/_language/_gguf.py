"""What reading and writing GGUF files share: the library, which is imported when it is needed, and its names."""

from pathlib import Path
from typing import Any

from jaxprune.storage import StorageError

MODULES = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "attention_norm": "attn_norm", "mlp_norm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
OWN_SIZES = "deci"  # the architecture whose layers llama.cpp gives sizes of their own; apart from that it is llama
PAIRED = ("llama", OWN_SIZES)  # features that are turned together lie side by side
STRETCHES = "rope_freqs.weight"


def library() -> Any:
    """Import gguf, or say how to install it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "GGUF files need the library gguf: pip install 'jaxprune[gguf]'", name="gguf"
        ) from error
    return gguf


def open_reader(gguf: Any, path: Path) -> Any:
    """Open a file; raise a StorageError of what is no whole GGUF file, or one of several parts."""
    if not path.is_file():
        raise StorageError(f"{path} is no file.")
    try:
        reader = gguf.GGUFReader(path)
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise StorageError(f"{path} is no whole GGUF file ({str(error)[:100] or type(error).__name__}).") from error
    if parts > 1:
        raise StorageError(f"{path} is one of {parts} parts; llama-gguf-split --merge makes one file of them.")
    return reader


def tensor_name(path: str) -> str:
    """What a leaf is called there.

    >>> tensor_name("layer_3/q_proj/kernel"), tensor_name("norm/scale")
    ('blk.3.attn_q.weight', 'output_norm.weight')
    """
    *layer, module, leaf = path.split("/")
    within = "".join(name.replace("layer_", "blk.") + "." for name in layer)
    return f"{within}{MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def is_turned(path: str) -> bool:
    """Whether a leaf makes queries or keys, whose features are rotated."""
    return path.split("/")[-2] in ("q_proj", "k_proj")


def one_or_all(numbers: tuple[int, ...]) -> int | list[int]:
    """Return the number that all layers have, or the number of each."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)
