"""What a network's images are like, as it takes them."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gdfq.graph.nodes import batch_norm_act
from gdfq.graph.sizes import hints
from gdfq.nn import BatchNormAct

REACH = 3.0  # ImageNet's pixels reach from -2.1 to 2.6, MNIST's from -0.4 to 2.8


@dataclass(frozen=True)
class Pixels:
    """What a model's images are like, as it takes them: numbers for each channel. See `gdfq.graph.scale`.

    Attributes:
        mean, std: over all images, of any size.
        low, high: what a pixel can be.
        origin: where this is from, in words.
        doubt: what speaks against it; empty where nothing does.
        black_to_white: whether `low` and `high` are what black and white are as the model takes them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    origin: str
    doubt: str = ""
    black_to_white: bool = False

    @classmethod
    def standardized(cls, channels: int) -> "Pixels":
        """Of mean 0 and standard deviation 1."""
        return cls.around((0.0,) * channels, (1.0,) * channels, "standardized")

    @classmethod
    def around(cls, mean: tuple[float, ...], std: tuple[float, ...], origin: str) -> "Pixels":
        """With bounds of `REACH` standard deviations, where nobody says how far a pixel can be from the mean."""
        low = tuple(m - REACH * s for m, s in zip(mean, std, strict=True))
        high = tuple(m + REACH * s for m, s in zip(mean, std, strict=True))
        return cls(mean, std, low, high, origin)

    def __str__(self) -> str:
        return f"{self.numbers('mean', 'std', 'low', 'high')}, {self.origin}"

    def numbers(self, *names: str) -> str:
        """Of the first four channels."""
        rows = ((name, getattr(self, name)) for name in names)
        return ", ".join(f"{name} " + "/".join(f"{value:.3g}" for value in values[:4]) for name, values in rows)

    def scaled(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` of mean 0 and standard deviation 1, brought to this scale."""
        mean, std = self.tensors(x.device)
        return x * std + mean

    def tensors(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, `(C, 1, 1)` float32."""
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std


@torch.no_grad()
def reach_of(module: fx.GraphModule, values: list[fx.Node], pixels: Pixels) -> dict[fx.Node, Tensor]:
    """The least and the greatest that `values`, which are affine in the image, can be for pixels within their bounds.

    Args:
        module: the captured graph.
        values: nodes of it.

    Returns:
        `(2,)` float32 each. Exact where a value depends on one channel or up to four, else from images of low and of
        high pixels alone.
    """
    if not values:
        return {}
    device = next(module.parameters()).device
    channels = len(pixels.low)
    ends = list(zip(pixels.low, pixels.high, strict=True))
    corners = list(itertools.product(*ends)) if channels <= 4 else [pixels.low, pixels.high]
    shape = next(node for node in module.graph.nodes if node.op == "placeholder").meta["val"].shape
    images = torch.tensor(corners, device=device)[..., None, None].expand(-1, -1, *hints(shape[2:])).contiguous()
    run = _Evaluation(module)
    run.run(images, wanted=values)
    return {value: torch.stack(torch.aminmax(run.env[value])).float() for value in values}


class _Evaluation(fx.Interpreter):
    """Runs a captured graph as far as what is wanted."""

    def run(self, images: Tensor, wanted: list[fx.Node]) -> None:  # type: ignore[override]
        needed = set(wanted)
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.args_iter = iter((images,))
        self.env = {}
        for node in self.graph.nodes:
            if node in needed:
                self.env[node] = self.run_node(node)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is batch_norm_act:
            x, mean, var, weight, bias, eps, act = args
            return BatchNormAct(eps, act)(x, mean, var, weight, bias)
        return super().call_function(target, args, kwargs)
