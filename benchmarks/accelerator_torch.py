"""What `benchmarks.accelerator` does, in torch on the same device; nothing where torch is not installed."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.sparsegpt import of_torch

SPARSITY = 0.9
HAS_TORCH = importlib.util.find_spec("torch") is not None
if HAS_TORCH:
    import torch

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Runs = Mapping[str, Callable[[], Any]]


def describe() -> str | None:
    """Say which torch on which device; None without torch."""
    return f"{torch.__version__} on {DEVICE}" if HAS_TORCH else None


def use_threads(count: int | None) -> None:
    """Let torch use so many threads; all cores where none are given."""
    if HAS_TORCH and count is not None:
        torch.set_num_threads(count)


def _ready(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def run() -> Any:
        found = function(*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def _there(array: np.ndarray) -> Any:
    return torch.from_numpy(np.array(array)).to(DEVICE)


def std(layers: Sequence[Any]) -> Any:
    """Compare with a standard deviation."""
    return [w.abs() >= w.std(correction=0) for w in layers]


def layer(layers: Sequence[Any]) -> Any:
    """Find each layer's threshold by `kthvalue`."""
    return [w.abs() > w.abs().flatten().kthvalue(round(SPARSITY * w.numel())).values for w in layers]


def all_layers(layers: Sequence[Any]) -> Any:
    """Find one threshold for all by `kthvalue`."""
    joined = torch.cat([w.abs().flatten() for w in layers])
    threshold = joined.kthvalue(round(SPARSITY * joined.numel())).values
    return [w.abs() > threshold for w in layers]


def n_m(layers: Sequence[Any]) -> Any:
    """Keep two of four by `topk`."""
    found = []
    for w in layers:
        groups = w.abs().T.reshape(-1, 4)
        kept = groups.topk(2, dim=1).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
        found.append(mask.reshape(w.shape[::-1]).T)
    return found


def masks(method: Callable[[Sequence[Any]], Any], layers: Sequence[np.ndarray]) -> Runs:
    """Make masks of all layers."""
    return {"torch": _ready(method, [_there(w) for w in layers])} if HAS_TORCH else {}


def steps(kernels: Sequence[np.ndarray], kept: Sequence[np.ndarray], x: np.ndarray) -> Runs:
    """A step of Adam, dense and with weights multiplied by their masks, as `torch.nn.utils.prune` does."""
    if not HAS_TORCH:
        return {}
    data, zeros = _there(x), [_there(mask).float() for mask in kept]

    def stepper(masked: bool) -> Callable[[], Any]:
        weights = [_there(w).requires_grad_() for w in kernels]
        adam = torch.optim.Adam(weights, lr=1e-4)

        def step() -> None:
            y = data
            for w, mask in zip(weights, zeros, strict=True):
                y = torch.relu(y @ (w * mask if masked else w))
            adam.zero_grad()
            y.square().mean().backward()
            adam.step()

        return _ready(step)

    return {"torch, dense": stepper(False), "torch, times a mask": stepper(True)}


def solvers(weights: np.ndarray, gram: np.ndarray) -> Runs:
    """SparseGPT by its published algorithm."""
    if not HAS_TORCH:
        return {}
    return {"torch sparsegpt": _ready(of_torch, _there(weights.T), _there(gram), "50 %")}


def calibration(kernels: Sequence[np.ndarray], x: np.ndarray, batches: int) -> Runs:
    """Forward passes, and those that add up the Gram matrix of every input."""
    if not HAS_TORCH:
        return {}
    weights, data = [_there(w) for w in kernels], _there(x)

    def forward(grams: bool) -> Any:
        sums = [torch.zeros_like(w) for w in weights]
        for _ in range(batches):
            y = data
            for w, total in zip(weights, sums, strict=True):
                if grams:
                    total.addmm_(y.T, y)
                y = torch.relu(y @ w)
        return y, sums

    return {"torch, forward": _ready(forward, False), "torch, Grams by hand": _ready(forward, True)}


def cut(dense: Sequence[Any], small: Sequence[Any], x: np.ndarray) -> Runs:
    """The transformer of `benchmarks.shrink`, dense and cut."""
    if not HAS_TORCH:
        return {}
    data = _there(x)

    def norm(x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    @torch.inference_mode()
    def forward(blocks: Sequence[Mapping[str, Any]]) -> Any:
        x = data
        for p in blocks:
            y = norm(x)
            q, k, v = (torch.einsum("btd,dhe->bhte", y, p[name]) for name in ("q", "k", "v"))
            weights = torch.softmax(torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.shape[-1]), -1)
            x = x + torch.einsum("bqhe,hed->bqd", (weights @ v).transpose(1, 2), p["o"])
            x = x + torch.nn.functional.gelu(norm(x) @ p["up"], approximate="tanh") @ p["down"]
        return x

    there = [[{name: _there(array) for name, array in block.items()} for block in blocks] for blocks in (dense, small)]
    return {"torch, dense": _ready(forward, there[0]), "torch, cut": _ready(forward, there[1])}
