"""The copy of the user's model that is captured: in eval mode whatever it overrides, with BatchNorms that are ones."""

import itertools
import warnings

import torch
from torch import Tensor, nn

from gdfq.graph.nodes import some

_BUFFERS = ("running_mean", "running_var", "weight", "bias")


def to_eval_mode(model: nn.Module) -> None:
    """`model.eval()`, and module by module where that is overridden and does not get there."""
    model.eval()
    left = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    for module in model.modules():
        module.training = False
    if left:
        warnings.warn(
            f"model.eval() leaves {len(left)} modules in training mode ({some(left)}): in the copy that is quantized "
            "they are in eval mode",
            stacklevel=4,
        )


def frozen_batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that keep a BatchNorm's statistics and are none of PyTorch's, by name."""
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if all(isinstance(getattr(module, name, None), Tensor) for name in _BUFFERS[:2])
        and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


@torch.no_grad()
def replace_frozen_batch_norms(model: nn.Module) -> None:
    """Put PyTorch's BatchNorms with the same numbers in the place of other packages', where they compute the same."""
    found = frozen_batch_norms(model)
    same = {module: _same_batch_norm(module) for module in found.values()}
    replaced = [path for path, module in found.items() if path and same[module] is not None]
    for path in replaced:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, same[found[path]])
    if replaced:
        warnings.warn(
            f"{len(replaced)} frozen BatchNorms are taken as PyTorch's with the same numbers ({some(replaced)})",
            stacklevel=4,
        )


def _same_batch_norm(module: nn.Module) -> nn.Module | None:
    """A BatchNorm that computes what `module` does, on a random input; None if there is none."""
    numbers = {name: getattr(module, name, None) for name in _BUFFERS}
    mean = numbers["running_mean"]
    numbers = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    if any(value.shape != (len(mean),) for value in numbers.values()):
        return None
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(2, len(mean), 4, 3, generator=random).to(mean)
    epsilons = dict.fromkeys((getattr(module, "eps", None), 1e-5, 1e-3, 0.0))
    for (kind, x), eps in itertools.product(((nn.BatchNorm2d, maps), (nn.BatchNorm1d, maps[..., 0, 0])), epsilons):
        if not isinstance(eps, float):
            continue
        layer = kind(len(mean), eps, affine=len(numbers) > 2).to(mean).eval().requires_grad_(False)
        layer.load_state_dict(numbers, strict=False)
        try:
            if torch.allclose(layer(x), module(x.clone()), rtol=1e-4, atol=1e-5):
                return layer
        except Exception:  # it takes no such input, or returns something else than a tensor of its shape
            continue
    return None
