"""Operators that move or pick values: each gives what writes it on a tensor, codes or numbers alike."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from gdfq.deploy.call import Call
from gdfq.deploy.pools import pool_attributes
from gdfq.deploy.values import Move
from gdfq.errors import GdfqError

_PADDING = {"constant": "constant", "reflect": "reflect", "reflection": "reflect", "replicate": "edge",
            "replication": "edge", "circular": "wrap"}  # fmt: skip
_MOST_INDICES = 2**20  # of the picks that are written one by one


def _reshape(call: Call, shape: tuple[int | None, ...] | None = None) -> Move:
    shape = call.shape() if shape is None else shape
    return lambda x, zero: call.builder.add("Reshape", x, call.as_reshape(shape))


def _transpose(call: Call) -> Move:
    """The permutation is read off the strides of a transposed example."""
    dimensions = len(call.shape())
    example = torch.empty(tuple(range(2, dimensions + 2)), device="meta")
    strides = call.run(example).stride()
    order = [example.stride().index(stride) for stride in strides]
    return lambda x, zero: call.builder.add("Transpose", x, perm=order)


def _slice(call: Call) -> Move:
    dim = call.fixed("dim")
    start, end, step = (call.fixed(name) for name in ("start", "end", "step"))
    return sliced(call, [dim], [start or 0], [2**62 if end is None else end], [step])


def sliced(call: Call, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> Move:
    """A part of a tensor, by the numbers that ONNX's Slice takes."""
    builder = call.builder
    rank = len(call.shape("self"))
    positive = [axis % rank for axis in axes]
    numbers = [builder.constant(list(values), np.int64) for values in (starts, ends, positive, steps)]
    return lambda x, zero: builder.add("Slice", x, *numbers)


def _narrow(call: Call) -> Move:
    start, length = call.fixed("start"), call.fixed("length")
    return sliced(call, [call.fixed("dim")], [start], [start + length], [1])


def _select(call: Call) -> Move:
    index = call.builder.constant(call.fixed("index"), np.int64)
    dim = call.fixed("dim") % len(call.shape("self"))
    return lambda x, zero: call.builder.add("Gather", x, index, axis=dim)


def _split(call: Call) -> list[Move]:
    """Whatever the pieces were asked for by, their sizes are seen."""
    dim = call.fixed("dim")
    ends = list(itertools.accumulate(call.known(shape[dim]) for shape in call.shapes()))
    return [sliced(call, [dim], [start], [end], [1]) for start, end in itertools.pairwise([0, *ends])]


def _unbind(call: Call) -> list[Move]:
    dim = call.fixed("dim") % len(call.shape("self"))
    indices = [call.builder.constant(number, np.int64) for number in range(len(call.shapes()))]
    return [lambda x, zero, index=index: call.builder.add("Gather", x, index, axis=dim) for index in indices]


def _flip(call: Call) -> Move:
    dims = call.fixed("dims")
    count = len(dims)
    return sliced(call, dims, [-1] * count, [-(2**62)] * count, [-1] * count)


def _index_select(call: Call) -> Move:
    return _gather(call, call.fixed("dim"), call.array("index"))


def _index(call: Call) -> Move:
    indices = call.fixed("indices")
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or indices[given[0]].dtype == torch.bool:
        return _picked(call)
    return _gather(call, given[0], indices[given[0]].cpu().numpy())


def _gather(call: Call, dim: int, indices: np.ndarray) -> Move:
    name = call.builder.constant(indices, np.int64)
    return lambda x, zero: call.builder.add("Gather", x, name, axis=dim % len(call.shape("self")))


def _expand(call: Call) -> Move:
    """Sizes that stay as they are are 1 for ONNX, so that the batch need not be known."""
    shape, before = call.shape(), call.shape("self")
    before = (1,) * (len(shape) - len(before)) + before
    sizes = [1 if size == old else call.known(size) for size, old in zip(shape, before, strict=True)]
    constant = call.builder.constant(sizes, np.int64)
    return lambda x, zero: call.builder.add("Expand", x, constant)


def _repeat(call: Call) -> Move:
    repeats = call.fixed("repeats")
    constant = call.builder.constant(repeats, np.int64)
    if len(repeats) > len(call.shape("self")):
        raise GdfqError(f"{call.place}: repeat adds dimensions, which the ONNX writer does not know")
    return lambda x, zero: call.builder.add("Tile", x, constant)


def pad(call: Call) -> Move:
    """With zeros, or values of the tensor itself; ONNX counts dimensions from the first, and PyTorch from the last."""
    padding = call.fixed("pad" if "pad" in call.arguments else "padding")
    mode = call.fixed("mode") if "mode" in call.arguments else call.op.partition("_")[0]
    builder = call.builder
    # All dimensions: where only some are named, onnxruntime 1.32 goes wrong when it changes the layout.
    before, after = (padding[start::2][::-1] for start in (0, 1))
    rest = [0] * (len(call.shape("self")) - len(before))
    pads = builder.constant([*rest, *before, *rest, *after], np.int64)

    def write(x: str, zero: np.generic) -> str:
        fill = builder.constant(zero) if _PADDING[mode] == "constant" else ""
        return builder.add("Pad", x, pads, fill, mode=_PADDING[mode])

    return write


def _max_pool(call: Call) -> Move:
    attributes = pool_attributes(call)
    return lambda x, zero: call.builder.add("MaxPool", x, **attributes)


def _first_of(function: Callable[[Call], Move]) -> Callable[[Call], list[Move]]:
    """Of operators that also give indices, which nobody reads."""
    return lambda call: [function(call)]


def _extreme(operator: str) -> Callable[[Call], Move]:
    def reduce(call: Call) -> Move:
        dims = call.fixed("dim")
        dims = [dims] if isinstance(dims, int) else list(dims) or list(range(len(call.shape("self"))))
        axes = call.builder.constant(dims, np.int64)
        keepdims = int(call.fixed("keepdim"))
        return lambda x, zero: call.builder.add(operator, x, axes, keepdims=keepdims)

    return reduce


def _adaptive_max_pool(call: Call) -> Move:
    """Windows of one size where sizes divide, else the maximum over each window, one axis after the other."""
    outputs = call.shape()[2:]
    dims = list(range(2, 2 + len(outputs)))
    sizes = call.sizes("self", dims)
    builder = call.builder
    if all(size % output == 0 for size, output in zip(sizes, outputs, strict=True)):
        kernel = [size // output for size, output in zip(sizes, outputs, strict=True)]
        return lambda x, zero: builder.add("MaxPool", x, kernel_shape=kernel, strides=kernel)

    def write(x: str, zero: np.generic) -> str:
        for dim, size, output in zip(dims, sizes, outputs, strict=True):
            axes = builder.constant([dim], np.int64)
            windows = [(index * size // output, -(-(index + 1) * size // output)) for index in range(output)]
            parts = [sliced(call, [dim], [start], [end], [1])(x, zero) for start, end in windows]
            x = builder.add("Concat", *(builder.add("ReduceMax", part, axes) for part in parts), axis=dim)
        return x

    return write


def _nearest(call: Call) -> Move:
    """Resizing to the nearest is picking rows, columns and so on; which, PyTorch itself says."""
    outputs = call.shape()[2:]
    sizes = call.sizes("self", list(range(2, 2 + len(outputs))))
    picks = [_picks(call, axis, sizes) for axis in range(len(outputs))]
    moves = [
        _gather(call, axis + 2, np.array(picked))
        for axis, picked in enumerate(picks)
        if picked != list(range(sizes[axis]))
    ]

    def write(x: str, zero: np.generic) -> str:
        for move in moves:
            x = move(x, zero)
        return x

    return write


def _picks(call: Call, axis: int, sizes: list[int]) -> list[int]:
    shape = [1, 1, *(size if index == axis else 1 for index, size in enumerate(sizes))]
    numbers = torch.arange(sizes[axis], dtype=torch.float32).view(shape).expand(1, 1, *sizes).contiguous()
    result = call.run(numbers)[0, 0]
    return result.movedim(axis, 0).flatten(1)[:, 0].long().tolist()


def _picked(call: Call) -> Move:
    """Any other pick, element by element, the same one from every image, or zeros."""
    before, shape = call.shape("self"), call.shape()
    unknown = GdfqError(f"{call.place}: the ONNX writer does not know this use of {call.op}")
    if before[0] is not None or shape[0] is not None or None in before[1:] + shape[1:]:
        raise unknown
    count = int(np.prod(before[1:]))
    if count >= 2**24 or int(np.prod(shape[1:])) > _MOST_INDICES:  # float32 counts as far as 2^24
        raise unknown
    numbers = torch.arange(1, 2 * count + 1, dtype=torch.float32).view(2, *before[1:])
    one, other = call.run(numbers).long()
    if not torch.equal(one + count * (one > 0), other) or not one.numel() or one.min() < 0 or one.max() > count:
        raise unknown
    padding = int(one.min() == 0)  # a zero in front
    indices = call.builder.constant((one - 1 + padding).flatten().numpy(), np.int64)
    builder = call.builder

    def write(x: str, zero: np.generic) -> str:
        flat = builder.add("Reshape", x, call.as_reshape((None, count)))
        if padding:
            flat = builder.add("Pad", flat, builder.constant([0, 1, 0, 0], np.int64), builder.constant(zero))
        return builder.add("Reshape", builder.add("Gather", flat, indices, axis=1), call.as_reshape(shape))

    return write


_SAME_ORDER = (
    "reshape",
    "view",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "ravel",
    "view_as",
    "reshape_as",
    "atleast_2d",
    "atleast_3d",
    "squeeze_copy",
    "unsqueeze_copy",
    "view_copy",
)
MOVES: dict[str, Callable[[Call], Move | list[Move]]] = {
    **dict.fromkeys(_SAME_ORDER, _reshape),
    **dict.fromkeys(["permute", "transpose", "t", "mT", "numpy_T", "movedim", "swapaxes", "permute_copy"], _transpose),
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"], _split),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expand),
    **dict.fromkeys(["max_pool1d", "max_pool2d", "max_pool3d"], _max_pool),
    **dict.fromkeys(["max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"],
                    _first_of(_max_pool)),
    **dict.fromkeys(["adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"],
                    _first_of(_adaptive_max_pool)),
    **dict.fromkeys(["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
                     "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"], _nearest),
    **dict.fromkeys(["pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
                     "replication_pad1d", "replication_pad2d", "replication_pad3d"], pad),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "unbind": _unbind,
    "flip": _flip,
    "index_select": _index_select,
    "index": _index,
    "repeat": _repeat,
    "amax": _extreme("ReduceMax"),
    "amin": _extreme("ReduceMin"),
    "max": _first_of(_extreme("ReduceMax")),
    "min": _first_of(_extreme("ReduceMin")),
    **dict.fromkeys(["channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "roll", "repeat_interleave", "rot90",
                     "unfold", "im2col", "diagonal", "fliplr", "flipud"], _picked),
}  # fmt: skip
