"""Capture the user's model as a graph in normal form.

Everything goes through `torch.export`, so it does not matter how the model is written: modules or functional calls,
lambdas, in-place operators, one activation module used ten times. In the normal form BN and the activation behind it
are one node; parameters keep the names they have in the user's model. The teacher and the quantized model are two
rewritings of it.
"""

import copy
import itertools
import operator
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from gdfq.errors import GdfqError
from gdfq.graph.nodes import activation_name, aten, batch_norm_act, name_of

REACH = 3.0  # ImageNet's pixels reach from -2.1 to 2.6, MNIST's from -0.4 to 2.8
_FROZEN_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class Pixels:
    """What a model's images are like, as it takes them: numbers for each channel. See `gdfq.graph.pixels`.

    Attributes:
        mean, std: over all images, of any size.
        low, high: what a pixel can be.
        origin: where this is from, in words.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    origin: str

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
        rows = ((name, getattr(self, name)) for name in ("mean", "std", "low", "high"))
        text = ", ".join(f"{name} " + "/".join(f"{value:.3g}" for value in values[:4]) for name, values in rows)
        return f"{text}, {self.origin}"

    def scaled(self, x: Tensor) -> Tensor:
        """Images `(N, C, H, W)` of mean 0 and standard deviation 1, brought to this scale."""
        if not any(self.mean) and set(self.std) == {1.0}:
            return x
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return x * std + mean


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form.

    Attributes:
        module: the graph; its parameters and buffers have the names of the user's model, and are a copy.
        image_shape: `(channels, height, width)`.
        num_classes: length of the logits.
        pixels: what its images are like; None where nobody has asked.
    """

    module: fx.GraphModule
    image_shape: tuple[int, int, int]
    num_classes: int
    pixels: Pixels | None = None


def capture(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> CapturedModel:
    """Capture `model` in eval mode with a dynamic batch. The model itself is not changed: what is captured is a copy,
    without a wrapper for several devices or a compiler and in float32; where it had others, a warning says so.

    Args:
        model: takes one image batch `(N, channels, height, width)` and returns logits `(N, classes)`.
        image_size: height and width, or one number for both; default: what the model says of itself (`in_size` of
            pytorchcv, `default_cfg` of timm).
        channels: default: the input channels of its first convolution.
        device: where the copy lives.

    Raises:
        GdfqError: no BN layer with running statistics, shape not known or rejected, a single logit, not capturable
            (with the line).
    """
    model = unwrapped(model)
    shape = _image_shape(model, image_size, channels)
    model = _copied(model).to(device).eval().requires_grad_(False)
    example = torch.randn(2, *shape, device=device)
    num_classes = _try_model(model, example)
    module = fx.GraphModule(*_export(model, example))
    _to_normal_form(module)
    if not any(node.target is batch_norm_act for node in module.graph.nodes):
        raise GdfqError(
            "the model has no BatchNorm layer with running statistics: the generator learns from them, so there is "
            "nothing to learn from. If BatchNorm was folded into the convolutions, use the model from before that."
        )
    return CapturedModel(module, shape, num_classes)


def _image_shape(
    model: nn.Module, image_size: int | tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    timm_shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if image_size is None:
        image_size = getattr(model, "in_size", None) or (timm_shape and timm_shape[1:])
        if image_size is None:
            raise GdfqError(
                "the image size cannot be read off the model: give it as `image_size` (`--image-size` on the command "
                "line), for example 32 for CIFAR or 224 for most ImageNet models"
            )
    if channels is None:
        convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
        channels = timm_shape[0] if timm_shape else getattr(next(convolutions, None), "in_channels", 3)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return channels, int(height), int(width)


def unwrapped(model: nn.Module) -> nn.Module:
    """What a wrapper for several devices or a compiler holds; a warning says that it is without."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            inner = model._orig_mod
        else:
            return model
        warnings.warn(f"the model in the {type(model).__name__} is quantized, without the wrapper", stacklevel=3)
        model = inner


def _copied(model: nn.Module) -> nn.Module:
    """A float32 copy. Tensors that were computed, as kept features or a pruned weight, have a history that PyTorch does
    not copy; their values are."""
    computed = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in _tensors_in(vars(module))
        if tensor.grad_fn is not None
    }
    try:
        model = copy.deepcopy(model, computed)
    except Exception as error:
        raise GdfqError(f"the model cannot be copied: {_first_line(error)}") from error
    stored = itertools.chain(model.parameters(), model.buffers())
    others = {tensor.dtype for tensor in stored if tensor.is_floating_point()} - {torch.float32}
    if others:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        warnings.warn(f"the model is in {names}: it is quantized from a float32 copy", stacklevel=4)
    return model.float()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in dictionaries, lists and tuples, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for element in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(element)


@torch.no_grad()
def _try_model(model: nn.Module, example: Tensor) -> int:
    """Run the model once and return the number of classes."""
    shape = tuple(example.shape[1:])
    try:
        logits = model(example)
    except Exception as error:
        raise GdfqError(
            f"the model rejects images of shape {shape} (channels, height, width){_user_line(error)}: "
            f"{_first_line(error)}\nGive the right shape as `image_size` and `channels`."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(example):
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise GdfqError(
            f"the model must return logits (N, classes) for images (N, channels, height, width), but returned {what} "
            f"for {tuple(example.shape)}; wrap it in a module that picks the logits"
        )
    if logits.shape[1] == 1:
        raise GdfqError(
            "the model returns one logit an image, whose softmax is always 1: no loss says anything of it. Of a binary "
            "classifier, wrap it in a module that returns two, torch.cat([torch.zeros_like(logit), logit], 1)"
        )
    if not logits.isfinite().all():
        raise GdfqError("the model's logits are NaN or Inf on Gaussian noise: its weights or BN statistics are broken")
    return logits.shape[1]


def _export(model: nn.Module, example: Tensor) -> tuple[nn.Module, fx.Graph]:
    """Export, functionalize (no in-place operator is left) and return root and graph with one input, one output."""
    dynamic_batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic_batch, strict=False)
            module = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise GdfqError(
            f"the model cannot be captured as a graph{_user_line(error)}: {_first_line(error)}\n"
            "Its forward pass must not depend on the values of tensors, nor on the batch size."
        ) from error
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    graph.output(output[0] if isinstance(output, (tuple, list)) else output)
    graph.set_codegen(CodeGen())
    return module, graph


def _user_line(error: BaseException) -> str:
    """Where in the user's code `error` arose: the innermost frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _to_normal_form(module: fx.GraphModule) -> None:
    """Bring the graph to the form that the rewritings start from: see the module's docstring."""
    graph = module.graph
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for node in list(graph.nodes):
        if node.op == "get_attr":  # a layer that the model has under several names goes by its first
            node.target = names.get(id(operator.attrgetter(node.target)(module)), node.target)
        elif node.target is aten.view.default:  # a view of a contiguous tensor; a channels_last one must be copied
            node.target = aten.reshape.default
        elif node.target is aten.copy.default:  # what `y[...] = x` becomes; it has no derivative
            destination, source = node.args[:2]
            node.target, node.args = aten.expand_as.default, (source, destination)
        elif node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
        elif node.target is _FROZEN_BATCH_NORM:
            _merge_batch_norm(graph, node)
    for node in graph.nodes:
        if node.target is batch_norm_act and len(node.users) == 1:
            (user,) = node.users
            act = activation_name(user)
            if act:
                node.args = (*node.args[:-1], act)
                node.meta["name"] = node.meta.get("name") or name_of(node)
                user.replace_all_uses_with(node)
                graph.erase_node(user)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _merge_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the BN operator, which returns three tensors of which one is used, by a `batch_norm_act` node."""
    x, weight, bias, running_mean, running_var, _momentum, eps = node.args
    with graph.inserting_before(node):
        merged = graph.call_function(batch_norm_act, (x, running_mean, running_var, weight, bias, eps, "none"))
    merged.meta = {**node.meta, "val": None}
    for getitem in list(node.users):
        merged.meta["val"] = getitem.meta.get("val")
        getitem.replace_all_uses_with(merged)
        graph.erase_node(getitem)
    graph.erase_node(node)
