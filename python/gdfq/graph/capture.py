"""Capture the user's model as a graph in normal form.

Everything goes through `torch.export`, so it does not matter how the model is written: modules or functional calls,
lambdas, in-place operators, one activation module used ten times. In the normal form BN and the activation behind it
are one node; parameters keep the names they have in the user's model. The teacher and the quantized model are two
rewritings of it.
"""

import copy
import functools
import hashlib
import itertools
import operator
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from gdfq.errors import GdfqError
from gdfq.graph.image import mark_image
from gdfq.graph.nodes import activation_name, aten, batch_norm_act, name_of, some
from gdfq.graph.pixels import Pixels
from gdfq.graph.prepared import frozen_batch_norms, replace_frozen_batch_norms, to_eval_mode
from gdfq.graph.sizes import ImageSizes, fixed, sizes_of

_TOLERANCE = 1e-3  # of the largest logit: rounding, which many BNs in a row magnify
_NO_BATCH_SIZE = "nor may it depend on the batch size, as it does by `len(x)`, but not by `x.shape[0]`"
# Checks, and what a model writes into its buffers: in eval mode nothing that its logits depend on.
_LEFT_OUT = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.copy_.default)
_FROZEN_BATCH_NORM = aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form.

    Attributes:
        module: the graph; its parameters and buffers have the names of the user's model, and are a copy.
        image_shape: `(channels, height, width)`.
        num_classes: length of the logits.
        sizes: for which images the graph is right; to be called ahead of it, see `gdfq.graph.added`.
        pixels: what its images are like; None where nobody has asked.
    """

    module: fx.GraphModule
    image_shape: tuple[int, int, int]
    num_classes: int
    sizes: ImageSizes
    pixels: Pixels | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Of all parameters and buffers: which network it is."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def capture(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> CapturedModel:
    """Capture `model` in eval mode, for any batch and, where that can be known, any image size. The model itself is not
    changed: what is captured is a copy, without a wrapper for several devices or a compiler and in float32; where it
    had others, a warning says so.

    Args:
        model: takes one image batch `(N, channels, height, width)` and returns logits `(N, classes)`.
        image_size: height and width to capture at, or one number for both; default: what the model says of itself
            (`in_size` of pytorchcv, `default_cfg` of timm).
        channels: default: the input channels of its first convolution.
        device: where the copy lives.

    Raises:
        GdfqError: no BN layer with running statistics, shape not known or rejected, a single logit, not capturable
            (with the line).
    """
    model = unwrapped(model)
    shape = _image_shape(model, image_size, channels)
    model = _copied(model).to(device).requires_grad_(False)
    to_eval_mode(model)
    replace_frozen_batch_norms(model)
    tensors = itertools.chain(model.parameters(), model.buffers())
    fresh = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    example = torch.randn(2, *shape, device=device)
    expected = _try_model(model, example)
    module, sizes = _export(model, example)
    sizes = _tried(model, fresh, module, sizes, example, expected)
    _to_normal_form(module)
    _check_batch_norms(model, module.graph)
    return CapturedModel(module, shape, expected.shape[1], sizes)


def _check_batch_norms(model: nn.Module, graph: fx.Graph) -> None:
    found = [node for node in graph.nodes if node.target is batch_norm_act]
    paths = {path for node in found for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
    others = [path for path in frozen_batch_norms(model) if path not in paths]
    advice = (
        f"{some(others)} of {type(model.get_submodule(others[0])).__name__} keep such statistics, but do not compute "
        "what nn.BatchNorm2d does: put nn.BatchNorm2d with the same numbers in their place."
        if others
        else "If BatchNorm was folded into the convolutions, use the model from before that."
    )
    if not found:
        raise GdfqError(
            "the model has no BatchNorm layer with running statistics: the generator learns from them, so there is "
            f"nothing to learn from. {advice}"
        )
    if others:
        warnings.warn(f"the generator learns from some of the model's BatchNorms only: {advice}", stacklevel=3)


def _image_shape(
    model: nn.Module, image_size: int | tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    image_size = image_size or stated_size(model)
    if image_size is None:
        raise GdfqError(
            "the image size cannot be read off the model: give it as `image_size` (`--image-size` on the command "
            "line), for example 32 for CIFAR or 224 for most ImageNet models"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return channels or stated_channels(model), int(height), int(width)


def stated_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of its images, where it says them: `in_size` of pytorchcv, `default_cfg` of timm."""
    timm_shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    size = getattr(model, "in_size", None) or (timm_shape and timm_shape[1:])
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def stated_channels(model: nn.Module) -> int:
    """Channels of its images: timm's `default_cfg`, or what its first convolution takes."""
    timm_shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    return timm_shape[0] if timm_shape else getattr(next(convolutions, None), "in_channels", 3)


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
def _try_model(model: nn.Module, example: Tensor) -> Tensor:
    """Run the model and return its logits."""
    shape = tuple(example.shape[1:])
    try:
        logits = model(example.clone())  # which it may write into
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
    if not _close(model(example.clone()), logits):
        raise GdfqError(
            "the model's logits are others each time that it sees the same images, though it is in eval mode: "
            "something in it is random, as F.dropout without training=self.training, or changes with every call"
        )
    return logits


def _export(model: nn.Module, example: Tensor) -> tuple[fx.GraphModule, ImageSizes]:
    """Export and functionalize (no in-place operator is left): a graph with one input and one output, and its sizes.

    It is exported for any height and width first, and where that fails for those of the example alone.
    """
    any_size = torch.export.Dim.AUTO
    shape = tuple(example.shape[1:])
    try:
        with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined] # 1 is a size like others
            program = _program(model, example, {0: any_size, 2: any_size, 3: any_size})
        sizes = sizes_of(program, shape)
    except Exception:
        sizes = None
    if sizes is None:
        try:
            program = _program(model, example, {0: torch.export.Dim.DYNAMIC})
        except Exception as error:
            raise GdfqError(
                f"the model cannot be captured as a graph{_user_line(error)}: {_first_line(error)}\n"
                f"Its forward pass must not depend on the values of tensors; {_NO_BATCH_SIZE}"
            ) from error
        sizes = sizes_of(program, shape) or ImageSizes(shape, fixed(shape))
    module = program.module(check_guards=False)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    graph.output(output[0] if isinstance(output, (tuple, list)) else output)
    graph.set_codegen(CodeGen())
    for node in graph.nodes:
        if node.target is aten.view.default:  # a view of a contiguous tensor; others, as channels_last, must be copied
            node.target = aten.reshape.default
    return fx.GraphModule(module, graph), sizes


def _program(model: nn.Module, example: Tensor, dims: dict[int, Any]) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (example,), dynamic_shapes=(dims,), strict=False).run_decompositions({})


@torch.no_grad()
def _tried(
    model: nn.Module,
    fresh: nn.Module,
    module: fx.GraphModule,
    sizes: ImageSizes,
    example: Tensor,
    expected: Tensor,
) -> ImageSizes:
    """Hold the graph against the model: at the captured size, with a single image, and at another size; `sizes` without
    those at which they differ. `fresh` is the model before it has seen an image: it may have kept something of one."""
    if not _close(module(example.clone()), expected):
        raise GdfqError(
            "the captured graph computes other logits than the model: its forward pass must depend on nothing but the "
            "images and its parameters and buffers, and change none of them"
        )
    channels, height, width = sizes.shape
    random = torch.Generator().manual_seed(0)
    three, other = (
        torch.randn(3, channels, height + more, width + 2 * more, generator=random).to(example) for more in (0, 32)
    )
    if not _agree(model, module, three):
        raise GdfqError(f"the model takes two images of {height} x {width}, but not three; {_NO_BATCH_SIZE}")
    crowd = torch.cat([three[:2], 10 * three[2:]])  # an image unlike the others moves what is taken over all of them
    if not _close(model(crowd)[:2], model(three[:2].clone()), 20 * _TOLERANCE):
        warnings.warn(
            "an image's logits depend on the others of its batch, in eval mode, too: something in the model is "
            "normalized by what a batch happens to hold, as a BatchNorm without running statistics",
            stacklevel=4,
        )
    conditions = sizes.conditions
    if sizes.right_at(other.shape) and _agree(fresh, module, other) is False:
        conditions = (*conditions, *fixed(sizes.shape))
    return ImageSizes(sizes.shape, conditions, single=_agree(model, module, example[:1]) is True)


def _agree(model: nn.Module, module: fx.GraphModule, images: Tensor) -> bool | None:
    """Whether both give the same logits; None where the model takes no such images."""
    try:
        expected = model(images.clone())
    except Exception:
        return None
    try:
        return _close(module(images.clone()), expected)
    except Exception:
        return False


def _close(found: Any, expected: Any, tolerance: float = _TOLERANCE) -> bool:
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and found.shape == expected.shape):
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


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
        elif node.target is aten.copy.default:  # what `y[...] = x` becomes; it has no derivative
            destination, source = node.args[:2]
            node.target, node.args = aten.expand_as.default, (source, destination)
        elif node.target is aten._unsafe_view.default:  # a view of what nobody else has
            node.target = aten.view.default
        elif node.target in _LEFT_OUT:
            graph.erase_node(node)
        elif node.target is aten.convolution.default and not node.args[6]:
            dimensions = node.args[0].meta["val"].ndim - 2
            node.target = (aten.conv1d, aten.conv2d, aten.conv3d)[dimensions - 1].default
            node.args = (*node.args[:6], node.args[8])
        elif node.target is _FROZEN_BATCH_NORM:
            _merge_batch_norm(graph, node)
    mark_image(module)
    for node in graph.nodes:
        if node.target is batch_norm_act and len(node.users) == 1:
            (user,) = node.users
            act = activation_name(user)
            if act:
                node.args = (*node.args[:-1], act)
                node.meta["name"] = node.meta.get("name") or name_of(node)
                node.meta |= {"image": False, "affine": False}
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
