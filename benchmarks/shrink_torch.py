"""The networks of `benchmarks.shrink` in torch, cut by torch-pruning."""

import argparse
import copy
from typing import Any

import torch
import torch_pruning as tp
from rich.console import Console
from torch import nn

from benchmarks import timing

STAGES = ((1, 1), (2, 2), (4, 2), (8, 2))


def _cnn(size: int) -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    dense = [nn.Linear(64 * (size // 4) ** 2, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), *dense)


class _Block(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outs), nn.BatchNorm2d(outs)])
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or ins != outs:
            self.skip = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[1](self.b(torch.relu(self.norms[0](self.a(x)))))
        return torch.relu(y + self.skip(x))


def _resnet18(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    ins = width
    for factor, stride in STAGES:
        for number in range(2):
            layers.append(_Block(ins, width * factor, stride if number == 0 else 1))
            ins = width * factor
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ins, 10))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        q, k, v = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x + self.down(nn.functional.gelu(self.up(y), approximate="tanh"))


def _cut_transformer(model: nn.Module) -> None:
    """Half the heads and half the hidden units, as views of the weights: what any tool's result looks like."""
    for block in model:
        inner = block.heads // 2 * block.size
        for name in ("q", "k", "v"):
            _cut(getattr(block, name), outs=inner)
        _cut(block.o, ins=inner)
        _cut(block.up, outs=block.up.out_features // 2)
        _cut(block.down, ins=block.down.in_features // 2)


def _cut(layer: nn.Linear, outs: int | None = None, ins: int | None = None) -> None:
    layer.weight = nn.Parameter(layer.weight[:outs, :ins].clone())
    layer.out_features, layer.in_features = layer.weight.shape


def measure(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Cut one network in torch, time it, show and return the results."""
    torch.manual_seed(0)
    if name == "transformer":
        blocks = (_TransformerBlock(options.model_width, 8) for _ in range(options.layers))
        dense: nn.Module = nn.Sequential(*blocks).eval()
        x = torch.randn(options.batch_size, options.length, options.model_width)
        small = copy.deepcopy(dense)
        _cut_transformer(small)
    else:
        dense = (_cnn(options.size) if name == "cnn" else _resnet18(options.width)).eval()
        x = torch.randn(options.batch_size * (8 if name == "cnn" else 1), 3, options.size, options.size)
        small = copy.deepcopy(dense)
        head = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
        pruner = tp.pruner.MetaPruner(
            small, x[:1], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[head]
        )
        pruner.step()
    before, after = (tp.utils.count_ops_and_params(model, x) for model in (dense, small))
    with torch.inference_mode():
        rows = timing.compare({"dense": lambda: dense(x), "smaller": lambda: small(x)}, options.repeats)
    ratios = {row.variant: row.wall_ratio for row in rows}
    macs, sizes = (b / a for b, a in zip(before, after, strict=True))
    speedup = 1 / ratios["smaller"]
    title = f"{name} in torch: {macs:.2f} x fewer MACs, {sizes:.2f} x fewer parameters, {speedup:.2f} x as fast"
    console.print(timing.table(title, rows))
    return {
        "network": name, "framework": "torch", "macs": macs, "parameters": sizes, "speedup": speedup,
        "rows": [row._asdict() for row in rows],
    }  # fmt: skip
