"""The processes of one run, its ranks: the only file that knows of them, but for `gdfq.signs_of_life`. One process
alone gets back what it gives.

They are those that torchrun starts, or those of a process group that the user's own script has made. A batch is shared
out by rows: all that is random in it is drawn by every rank alike for the whole batch, and a rank goes on with its own
rows. The loss of the batch is the sum over ranks of their parts in it, so gradients are sums, too; and with the moments
and ranges of the whole batch, and the same sums, all ranks go on alike.
"""

import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gdfq.errors import GdfqError
from gdfq.signs_of_life import BEAT, SignsOfLife

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)  # of one exchange; a rank that takes longer is taken for lost
BUCKET = 25 * 2**20  # bytes of gradients that are exchanged at once
LONG_SILENCE = 30.0  # seconds without a sign of life, where nothing has failed: a machine may be busy

# Of this rank, by what for: how many exchanges it has begun, and bytes that it has handed over in them.
exchanges: Counter[str] = Counter()
traffic: Counter[str] = Counter()


class LostRank(GdfqError):  # noqa: N818 - it says what happened
    """Another rank has failed, or is gone; the message names it.

    Args:
        message: see there.
        speaker: the rank that is to say so.
    """

    def __init__(self, message: str, speaker: int = 0) -> None:
        super().__init__(message)
        self.speaker = speaker


# --- which one this is ---


_is_alone = False


def group_size() -> int:
    """How many processes the group has, whether this one computes with the others now or alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def count() -> int:
    return 1 if _is_alone else group_size()


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """The first rank writes and speaks."""
    return rank() == 0


def on_this_machine() -> int:
    """How many ranks there are here, as far as torchrun says it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if group_size() > 1 else 1


def obstacle() -> str | None:
    """Why an iteration cannot be a CUDA graph, or None."""
    return f"{count()} ranks exchange sums in it" if count() > 1 else None


def device() -> torch.device | None:
    """The GPU that is this rank's, where there are some and several ranks; else None."""
    is_one = count() > 1 and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_one else None


# --- batches in shares ---

_rows = 0  # of the batch that was shared out last


def part(batch: Tensor) -> Tensor:
    """This rank's rows of a batch `(N, ...)`; ranks that come first have one more where it cannot be divided."""
    return batch if count() == 1 else batch.tensor_split(count())[rank()]


def shard(batch: Tensor) -> Tensor:
    """The same, of the batch that is computed with now: it is the whole one that `rows` and what follows refer to."""
    global _rows
    _rows = len(batch)
    return part(batch)


def rows(own: int) -> int:
    """How many rows the whole batch has of which this rank's share, the one that `shard` gave last, has `own`."""
    is_shared = count() > 1 and own == _rows // count() + (rank() < _rows % count())
    return _rows if is_shared else own


def numel(x: Tensor) -> int:
    """How many elements the whole batch has of which `x` `(n, ...)` is this rank's share."""
    return x.numel() if count() == 1 else rows(len(x)) * x[0].numel()


def share(own: int) -> float:
    """Of a mean over the whole batch, what the mean over this rank's `own` rows counts."""
    return own / rows(own) if count() > 1 else 1.0


def check_batch(setting: str, size: int) -> None:
    """Raise `GdfqError` where a batch has no row for every rank."""
    if size < count():
        raise GdfqError(f"setting '{setting}' = {size} gives {count()} ranks less than an image each: raise it")


# --- the same for all ranks ---


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x, "moments")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _all_reduced(grad, "moments' gradients")


def summed(x: Tensor) -> Tensor:
    """The sum over ranks. Every rank's loss depends on every rank's `x`: its gradient is the sum of theirs."""
    return x if count() == 1 else _Summed.apply(x)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over ranks, all in one exchange; without gradients."""
    if count() > 1:
        _begin_to_add_up(tensors)()


def _begin_to_add_up(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """The same, but what is given back has to be called to end it; the tensors stay as they are until then."""
    if not tensors:
        return lambda: None
    total = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    work = _exchange("sums", total.numel() * total.element_size(), lambda: dist.all_reduce(total, async_op=True))

    def end() -> None:
        _or_lost(work.wait)
        parts = total.split([tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    return end


def totals(counts: Sequence[int]) -> list[int]:
    """The sums over ranks."""
    return [sum(values) for values in zip(*gathered(list(counts)), strict=True)]


def gathered(value: Value) -> list[Value]:
    """What each rank gives."""
    values = [value] * count()
    if count() > 1:
        _exchange("objects", 0, lambda: dist.all_gather_object(values, value))
    return values


@contextmanager
def adding_up_gradients(optimizer: torch.optim.Optimizer, others: Sequence[Tensor] = ()) -> Iterator[None]:
    """Around `backward()`: the gradients that the optimizer is about to use, and others' values with them, become their
    sums over ranks.

    Gradients are exchanged in buckets while backward goes on, in the order in which they come. That is the same on all
    ranks, as it is for the moments' gradients in between: they compute the same graph, and autograd goes through it in
    one thread for a device, in an order that depends on nothing but the graph.
    """
    if count() == 1:
        yield
        return
    bucket: list[Tensor] = []
    begun: list[Callable[[], None]] = []

    def gather(parameter: Tensor) -> None:
        assert parameter.grad is not None
        bucket.append(parameter.grad)
        if sum(gradient.nbytes for gradient in bucket) >= BUCKET:
            begun.append(_begin_to_add_up(bucket.copy()))
            bucket.clear()

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hooks = [
        parameter.register_post_accumulate_grad_hook(gather) for parameter in parameters if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    begun.append(_begin_to_add_up([*bucket, *others]))
    for end in begun:
        end()


def moments(
    means: Sequence[Tensor], variances: Sequence[Tensor], about: Sequence[Tensor], own: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of the whole batch, from those of this rank's rows, with gradients; of all layers in one exchange:

        mean = about + sum_r s_r d_r        var = sum_r s_r (var_r + d_r^2) - (mean - about)^2        d = mean_r - about

    Args:
        means, variances: `(C_l,)` float32 each, the variance biased.
        about: something near the mean, the same for all ranks.
        own: rows that this rank's are of; s_r are their shares.
    """
    if count() == 1:
        return list(means), list(variances)
    distances = [mean - near for mean, near in zip(means, about, strict=True)]
    squares = [variance + distance.square() for variance, distance in zip(variances, distances, strict=True)]
    total = summed(share(own) * torch.cat([*distances, *squares]))
    sizes = [len(mean) for mean in means]
    first, second = (half.split(sizes) for half in total.chunk(2))
    merged_means = [near + distance for near, distance in zip(about, first, strict=True)]
    merged = [(square - distance.square()).clamp_min(0) for square, distance in zip(second, first, strict=True)]
    return merged_means, merged


def extremes(x: Tensor) -> Tensor:
    """What has the minimum and the maximum of the whole batch: `x`, or `(2,)` float32 of both; infinite for NaN."""
    if count() == 1:
        return x
    ends = x.new_full((2,), -torch.inf, dtype=torch.float32)
    if x.numel():
        low, high = x.aminmax()
        ends = torch.stack([-low, high]).float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    low, high = _all_reduced(ends, "ranges", dist.ReduceOp.MAX)
    return torch.stack([-low, high])


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank. Nothing waits for a device."""
    return flag if count() == 1 else bool(_all_reduced(torch.tensor(float(flag)), "requests to stop"))


def from_first(make: Callable[[], Value]) -> Value:
    """What the first rank's `make()` gives, or raises; it is called there alone."""
    if count() == 1:
        return make()
    with together():
        values = [make() if is_first() else None]
    _exchange("objects", 0, lambda: dist.broadcast_object_list(values))
    return values[0]


def check_alike(what: str, value: Any) -> None:
    """Raise `GdfqError` on all ranks where `value` is not the same on all."""
    values = gathered(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise GdfqError(f"{what} of rank {others[0]} of {count()} are not those of rank 0: give all ranks the same")


@contextmanager
def together() -> Iterator[None]:
    """Ranks wait at the end for those that take longer, and what is raised on one is then raised on all. Inside, each
    is on its own."""
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        error = own
    wait_for_all()
    messages = gathered(None if error is None else _words(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise LostRank(message if number == 0 else f"rank {number} of {count()}: {message}")


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank is the only one: it computes, writes and warns as one process does."""
    global _is_alone
    if count() == 1:
        yield
        return
    _is_alone = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # those that are meant for the user, see `one_run`
            yield
    finally:
        _is_alone = False


def spread(numbers: Sequence[int], make: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Every number with what `make(number)` gives, in order; each rank makes as many as the others, and all get all."""
    for start in range(0, len(numbers), count()):
        now = numbers[start : start + count()]
        with together():
            own = make(now[rank()]) if rank() < len(now) else None
        for maker, number in enumerate(now):
            yield number, broadcast(own, maker)


def broadcast(tensor: Tensor | None, source: int = 0) -> Tensor:
    """The tensor of rank `source`, on the device that it has there; what others give does not matter."""
    if count() == 1:
        assert tensor is not None
        return tensor
    about = [(tensor.shape, tensor.dtype, tensor.device.type) if tensor is not None else None]
    _exchange("objects", 0, lambda: dist.broadcast_object_list(about, source))
    shape, dtype, device = about[0]
    given = tensor.contiguous() if rank() == source and tensor is not None else None
    result = torch.empty(shape, dtype=dtype, device=device) if given is None else given
    _exchange("images", result.numel() * result.element_size(), lambda: dist.broadcast(result, source))
    return result


# --- exchanges ---


def _all_reduced(x: Tensor, what: str, how: Any = None) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    how = dist.ReduceOp.SUM if how is None else how
    _exchange(what, total.numel() * total.element_size(), lambda: dist.all_reduce(total, how))
    return total


def _exchange(what: str, size: int, exchange: Callable[[], Value]) -> Value:
    exchanges[what] += 1
    traffic[what] += size
    return _or_lost(exchange)


def _or_lost(exchange: Callable[[], Value]) -> Value:
    """What it gives; where it fails, who is missing is found out."""
    try:
        return exchange()
    except RuntimeError as error:
        if _signs is None:
            raise
        raise LostRank(*_signs.of_failure()) from error


_runs = itertools.count()
_signs: SignsOfLife | None = None  # of the run that is on


def wait_for_all() -> None:
    """Until all ranks of a run are here, however long that takes, unless one is gone."""
    if _signs is None:
        return
    key = f"here/{next(_signs.waits)}"
    _signs.store.add(key, 1)
    pause = 0.01
    while _signs.store.add(key, 0) < count():
        time.sleep(pause)
        pause = min(2 * pause, BEAT)
        silent, _ = _signs.look()
        if _signs.failure() is not None or max(silent.values()) > LONG_SILENCE:
            raise LostRank(*_signs.of_failure())


# --- a run ---


@contextmanager
def one_run() -> Iterator[None]:
    """Inside, all ranks but the first are quiet, and what stops one of them is known to the others."""
    global _signs
    if count() == 1 or _signs is not None:
        yield
        return
    _signs = SignsOfLife(next(_runs), rank(), count(), exchanges.total)
    try:
        with warnings.catch_warnings():
            if not is_first():
                warnings.simplefilter("ignore")
            yield
    except LostRank:
        raise
    except BaseException as error:
        with suppress(RuntimeError):  # nobody may be left to be told
            _signs.fail(f"rank {rank()} of {count()}: {_words(error)}")
        raise
    finally:
        _signs.is_over.set()
        _signs.join(2 * BEAT)
        _signs = None


@contextmanager
def started() -> Iterator[None]:
    """The process group of those that torchrun has started along with this process, if it has.

    Of an error that all ranks have, those that are not to say it have `is_said`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise GdfqError(
                f"rank {os.environ['RANK']} has no GPU: there are {torch.cuda.device_count()} here; start as many with "
                "torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        with one_run():
            yield
    except GdfqError as error:
        error.is_said = rank() != getattr(error, "speaker", 0)
        raise
    finally:
        dist.destroy_process_group()


def is_restarted() -> bool:
    """Whether torchrun has started this process in place of one that had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, GdfqError) else f"{type(error).__name__}: {error}"
