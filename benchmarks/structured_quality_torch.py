"""Which channels torch-pruning cuts from the networks of `benchmarks.structured_quality`, on the same weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

Tree = Any
Gone = dict[str, list[int]]
WAYS: Mapping[str, Mapping[str, bool]] = {
    "each layer": {},
    "all layers": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}
HALVINGS = 10


def _there(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _convolution(p: Tree, strides: int = 1, bias: str | None = None) -> nn.Conv2d:
    window, _, ins, outs = p["w"].shape
    layer = nn.Conv2d(ins, outs, window, strides, window // 2, bias=bias is not None)
    layer.weight.data = _there(p["w"]).permute(3, 2, 0, 1).contiguous()
    if bias is not None:
        layer.bias.data = _there(p[bias])
    return layer


def _dense(p: Tree, places: int = 1) -> nn.Linear:
    ins, outs = p["w"].shape
    layer = nn.Linear(ins, outs)
    # Flattened, places come first in JAX, channels in torch.
    kernel = _there(p["w"]).reshape(places, ins // places, outs).transpose(0, 1).reshape(ins, outs)
    layer.weight.data, layer.bias.data = kernel.T.contiguous(), _there(p["b"])
    return layer


def _cnn(params: Tree) -> tuple[nn.Module, dict[nn.Module, str]]:
    a, b = (_convolution(params[name], bias="b") for name in "ab")
    c, d = _dense(params["c"], 4), _dense(params["d"])
    pools = [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(a, *pools, b, *pools, nn.Flatten(), c, nn.ReLU(), d), {a: "a/w", b: "b/w", c: "c/w"}


class _Layer(nn.Module):
    def __init__(self, p: Tree, strides: int = 1) -> None:
        super().__init__()
        self.convolution = _convolution(p, strides)
        # As it is in evaluation, with the statistics taken up by the scale and the offset.
        self.norm = nn.BatchNorm2d(p["w"].shape[-1], eps=0.0)
        self.norm.weight.data, self.norm.bias.data = _there(p["scale"]), _there(p["offset"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(x))


class _Block(nn.Module):
    def __init__(self, p: Tree, strides: int) -> None:
        super().__init__()
        self.a, self.b = _Layer(p["a"], strides), _Layer(p["b"])
        self.skip = _Layer(p["skip"], strides) if "skip" in p else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.skip(x))


def _resnet(params: Tree) -> tuple[nn.Module, dict[nn.Module, str]]:
    from benchmarks.structured_quality import STAGES

    stem = _Layer(params["stem"], 2)
    blocks = [_Block(p, strides) for p, (_, strides) in zip(params["blocks"], STAGES, strict=True)]
    names: dict[nn.Module, str] = {stem.convolution: "stem/w"}
    for number, block in enumerate(blocks):
        layers = {"a": block.a, "b": block.b, "skip": block.skip}
        names |= {
            layer.convolution: f"blocks/{number}/{n}/w" for n, layer in layers.items() if isinstance(layer, _Layer)
        }
    head = _dense(params["head"])
    return nn.Sequential(stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), names


def build(name: str, params: Tree) -> tuple[nn.Module, dict[nn.Module, str]]:
    """Return the network in torch, and of each layer that may be cut the path of its kernel."""
    model, names = (_cnn if name == "digits CNN" else _resnet)(params)
    return model.eval(), names


def choose(
    name: str, params: Tree, shape: tuple[int, ...], cost: Callable[[Gone], float], budget: float
) -> dict[str, Gone]:
    """Return by the name of each way the channels that go, by the path of a kernel: the fewest within the budget.

    Args:
        name: of the network.
        params: its parameters.
        shape: of images, ``[N, H, W, 1]``.
        cost: what the network costs without these channels.
        budget: the most that it may cost.
    """
    found = {}
    for way, options in WAYS.items():
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            gone = _prune(name, params, shape, middle, options)
            if gone is not None and cost(gone) <= budget:
                found[way], high = gone, middle
            elif gone is None:  # nothing is left of a layer
                high = middle
            else:
                low = middle
    return found


def _prune(name: str, params: Tree, shape: tuple[int, ...], ratio: float, options: Mapping[str, bool]) -> Gone | None:
    model, names = build(name, params)
    model, names = _copied(model, names)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.MetaPruner(
        model, torch.zeros(1, shape[3], *shape[1:3]), importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=ratio, max_pruning_ratio=1.0, ignored_layers=[head], **options,
    )  # fmt: skip
    gone: Gone = {}
    for group in pruner.step(interactive=True):
        (dep, indices) = group[0]
        gone[names[dep.target.module]] = sorted(int(i) for i in indices)
    sizes = {path: layer.weight.shape[0] for layer, path in names.items()}
    return None if any(len(indices) >= sizes[path] for path, indices in gone.items()) else gone


def _copied(model: nn.Module, names: Mapping[nn.Module, str]) -> tuple[nn.Module, dict[nn.Module, str]]:
    copied = copy.deepcopy(model)
    twins = dict(zip(model.modules(), copied.modules(), strict=True))
    return copied, {twins[layer]: path for layer, path in names.items()}
