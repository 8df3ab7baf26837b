"""What ranks compute, for `test_ranks.py`: every case from an equal state, on a small network, as tensors by name."""

import errno
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from small_models import Residual, randomize_batch_norm
from torch import Tensor
from torch.utils.data import Subset

import gdfq
from gdfq import demo, ranks
from gdfq.calibrate import calibrate
from gdfq.cli import main
from gdfq.clip_values import mse
from gdfq.config import Config
from gdfq.evaluate import agreement
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.graph.blocks import find_blocks
from gdfq.images.generator import GeneratorImages
from gdfq.images.real import RealImages
from gdfq.methods.calibration import clipped_by
from gdfq.methods.reconstruction import nearest
from gdfq.nn import FakeQuantize, activation_quantizers
from gdfq.random_state import RandomState
from gdfq.registry import SOURCES
from gdfq.reproduce import sources
from gdfq.run.checkpoint import load_checkpoint, save_checkpoint
from gdfq.run.training_run import TrainingRun
from gdfq.train.activations import Store
from gdfq.train.finetune import FineTuner
from gdfq.train.reconstruct import BlockTrainer
from gdfq.train.trainer import Trainer

DEVICE = torch.device(os.environ.get("GDFQ_RANK_CASES_ON", "cpu"))  # tests/gpu sets it
SETTINGS = {
    "method": "gdfq",
    "schedule.epochs": 6,
    "schedule.iterations": 5,
    "schedule.batch_size": 9,  # two ranks do not divide it, nor do four
    "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2,
    "schedule.range_batches": 2,
    "schedule.milestones": [5],
    "run.held_out_images": 10,
    "run.device": str(DEVICE),
    "reconstruction.batch_size": 9,
    "student.temperature": 1.0,
    "quantizer.weight_bits": 3,
    "quantizer.activation_bits": 3,
    "student.learning_rate": 1e-2,
}
FIRST = {"ranges": 0, "warm-up": 5, "training": 10}  # iterations of the phases
TRAINING: dict[str, dict[str, Any]] = {
    "embedding": {},
    "conditional": {"generator.architecture": "conditional"},
    "sums": {"generator.bns_reduction": "sum", "student.kd_reduction": "batchmean"},
    "qimera": {"images.source": "qimera"},
    "generator that is trained": {"schedule.generator_epochs": 1},
    "noise": {"images.source": "gaussian"},
    "ait": {"student.optimizer": "ait"},
    "learned steps": {"quantizer.observer": "learned_step"},
    "moving statistics": {"student.fixed_bns": False},
    "bfloat16": {"run.precision": "bfloat16"},
}


def new_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomize_batch_norm(Residual())
    model.fc.weight.data *= 20  # so that P and Q are sure enough to disagree
    return model


# Once, for all processes that are forked of one that has imported this.
CAPTURED = capture(new_model(), device=DEVICE)
TEACHER = build_teacher(CAPTURED)


def new_config(seed: int = 0, **settings: Any) -> Config:
    return Config.load("cifar", SETTINGS | {"run.seed": seed} | settings)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def labeled(count: int) -> list[tuple[Tensor, int]]:
    return [(image, number % 5) for number, image in enumerate(images(count).cpu())]


def new_student(config: Config) -> Any:
    student, _ = build_quantized(CAPTURED, config.quantizer)
    calibrate(student, [images(8), images(5, 1)])
    return student


def new_trainer(seed: int = 0, real: int = 0, **settings: Any) -> Trainer:
    config = new_config(seed, **settings)
    student = new_student(config)
    if real:
        source: Any = RealImages(labeled(real), TEACHER, (3, 8, 8), 5, config, DEVICE)
    else:
        source = SOURCES[config.images.source or "generator"](TEACHER, CAPTURED, config, DEVICE)
    return Trainer(TEACHER, student, source, config)


def gradients(**modules: Any) -> dict[str, Tensor]:
    return {
        f"gradient of {name} {key}": parameter.grad.clone()
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def ranges(student: Any) -> dict[str, Tensor]:
    return {f"range of {name}": quantizer.range.clone() for name, quantizer in activation_quantizers(student).items()}


def numbers(values: dict[str, float | None]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items() if value is not None}


# --- one iteration of every kind ---


def iteration(phase: str, seed: int, **settings: Any) -> dict[str, Tensor]:
    trainer = new_trainer(seed, **settings)
    trainer.iteration = FIRST[phase]
    trainer.source.begin_epoch(trainer.epoch, 1.0)
    trainer.step()
    source, student = trainer.source, trainer.student
    result = gradients(Q=student) | ranges(student) | numbers(trainer.read_metrics())
    result |= {f"buffer {name}": value.float().clone() for name, value in student.named_buffers()}
    if isinstance(source, GeneratorImages):
        result |= gradients(G=source.generator)
        result |= {f"G's {name}": value.float().clone() for name, value in source.generator.named_buffers()}
    return result


def in_buckets(phase: str, seed: int, **settings: Any) -> dict[str, Tensor]:
    """Every gradient is exchanged by itself."""
    with mock.patch.object(ranks, "BUCKET", 1):
        return iteration(phase, seed, **settings)


def order(**settings: Any) -> Tensor:
    """Of the exchanges in a step of G, `(n, 2)`: whether it is one of moments, and its bytes."""
    noted, exchange = [], ranks._exchange

    def exchange_and_note(what: str, size: int, *rest: Any) -> Any:
        noted.append(["moments" in what, size])
        return exchange(what, size, *rest)

    with mock.patch.object(ranks, "_exchange", exchange_and_note):
        in_buckets("warm-up", 0, **settings)
    return torch.tensor(noted)


def block(seed: int) -> dict[str, Tensor]:
    config = new_config(seed)
    student = new_student(config)
    student.requires_grad_(False)
    first, second = find_blocks(student)[:2]
    with torch.no_grad(), Store(2**30) as store:
        bank = images(20, seed)
        given, exact = (store.keep(20, iter([piece(bank)])) for piece in (first.quantized(), first.exact()))
        wanted = store.keep(20, iter([second.exact()(exact.select(torch.arange(20)))]))
    trainer = BlockTrainer(second, config, given, exact, wanted, RandomState(seed, DEVICE), nearest)
    trainer.optimizer = trainer._optimizer()
    trainer._schedule(0.5)  # with the penalty
    trainer._iteration()
    steps = {f"gradient of step {number}": step.grad for number, step in enumerate(trainer.steps.parameters)}
    return gradients(**trainer.roundings) | steps | {"error": trainer.error}


def finetune(seed: int) -> dict[str, Tensor]:
    config = new_config(seed)
    student = new_student(config)
    quantizers = [module for module in student.modules() if isinstance(module, FakeQuantize)]
    tuner = FineTuner(TEACHER, student, quantizers, images(20, seed), config, RandomState(seed, DEVICE))
    tuner._iteration()
    return gradients(Q=student) | {"loss": tuner.loss}


def calibrated(rule: Any, seed: int) -> dict[str, Tensor]:
    """Of batches of which the last has no image for every one of four ranks."""
    student = new_student(new_config())
    calibrate(student, [images(9, seed), images(2, seed + 9)], rule and clipped_by(rule, student))
    return ranges(student)


def bank(seed: int) -> dict[str, Tensor]:
    settings = {"inversion.images": 11, "inversion.batch_size": 4, "inversion.iterations": 3}
    source = SOURCES["inverted"](TEACHER, CAPTURED, new_config(seed, **settings), DEVICE)
    source.kept = Kept() if ranks.is_first() else None
    result = {"bank": source.bank, "held out": source.held_out_part}
    left = ranks.from_first(lambda: sorted(source.kept.parts))
    return result | {"parts left": torch.tensor(left)}


class Kept:
    """Of four parts, one is found; others are left in a dict."""

    def __init__(self) -> None:
        self.parts = {1: torch.full((4, 3, 8, 8), 0.5)}

    def find(self, part: int) -> Tensor | None:
        return self.parts.get(part)

    def leave(self, part: int, images: Tensor) -> None:
        assert part not in self.parts
        self.parts[part] = images


def figures(seed: int) -> dict[str, Tensor]:
    student = new_student(new_config())
    agreed = agreement(TEACHER, student, [images(9, seed), images(3, seed)])
    measured = gdfq.evaluate(student, labeled(13), batch_size=3)
    return numbers({name: getattr(agreed, name) for name in ("top1", "kl", "images")}) | numbers(
        {f"measured {name}": getattr(measured, name) for name in ("top1", "top5", "images")}
    )


CASES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "ranges": functools.partial(iteration, "ranges"),
    "warm-up": functools.partial(iteration, "warm-up"),
    **{name: functools.partial(iteration, "training", **settings) for name, settings in TRAINING.items()},
    "real images": functools.partial(iteration, "training", real=30),
    "buckets": functools.partial(in_buckets, "training"),
    "buckets, computed again": functools.partial(in_buckets, "training", **{"run.checkpointing": True}),
    "block": block,
    "fine-tuning": finetune,
    "minimum and maximum": functools.partial(calibrated, None),
    "histogram": functools.partial(calibrated, mse),
    "bank": bank,
    "figures": figures,
}


# By the BN behind, or nearly: these gradients are what rounding leaves of nothing.
TAKEN_OUT = ("G linear.bias", "G conv1.bias", "G conv2.bias", "G conv3.bias", "Q activation_quantizers.x.observer.step")


def difference(one: dict, other: dict, taken_out: tuple[str, ...] = TAKEN_OUT) -> float:
    """The largest, as a share of the largest value of its tensor."""
    assert one.keys() == other.keys()
    differences = [0.0]
    for name, value in one.items():
        if name.endswith(taken_out) or not value.numel():
            continue
        equal = value.isfinite() & other[name].isfinite()
        assert torch.equal(value[~equal].nan_to_num(), other[name][~equal].nan_to_num()), name
        if equal.any():
            scale = other[name][equal].abs().max().clamp_min(1e-12)
            differences.append(((value - other[name])[equal].abs().max() / scale).item())
    return max(differences)


# --- many iterations ---


def state(trainer: Trainer) -> dict[str, Tensor]:
    modules = {"Q": trainer.student, "G": trainer.source.generator}
    return {f"{name} {key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def trained(seed: int, reverse: bool = False) -> dict[str, Tensor]:
    """After twenty iterations; where it is reversed, with the images of each batch the other way around."""
    trainer = new_trainer(seed)
    trainer.iteration = 10
    share = trainer.source._share
    if reverse:
        trainer.source._share = lambda count: tuple(values.flip(0) for values in share(count))
    trainer.run()
    return state(trainer)


def interrupted(folder: Path, count: int) -> dict[str, Tensor]:
    """What two ranks have begun, carried on by any number of them."""
    trainer, path = new_trainer(), folder / "checkpoint.safetensors"
    if count == 2:
        for _ in range(12):
            trainer.step()
            trainer.iteration += 1
        saved = trainer.state_dict()
        if ranks.is_first():
            save_checkpoint(path, saved, {})
    with ranks.together():
        pass
    trainer = new_trainer()
    trainer.load_state_dict(load_checkpoint(path, {}))
    for _ in range(2):
        trainer.step()
        trainer.iteration += 1
    return state(trainer) | numbers(trainer.read_metrics())


# --- bugs that the comparison has to find ---


def _own_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _mean(tensors: Any, begin: Any = ranks._begin_to_add_up) -> Callable[[], None]:
    end = begin(tensors)

    def end_and_divide() -> None:
        end()
        for tensor in tensors:
            tensor.detach().div_(ranks.count())

    return end_and_divide


def _never_ended(tensors: Any, begin: Any = ranks._begin_to_add_up) -> Callable[[], None]:
    begin(tensors)
    return lambda: None


# Name -> case that finds it, what of `gdfq.ranks` is replaced, by what.
BUGS: dict[str, tuple[str, Any, str, Any]] = {
    "gradients averaged": ("embedding", ranks, "_begin_to_add_up", _mean),
    "gradients not waited for": ("buckets", ranks, "_begin_to_add_up", _never_ended),
    "no gradient of others": ("warm-up", ranks._Summed, "backward", staticmethod(_own_gradient)),
    "moments of the rank's own images": ("warm-up", ranks, "moments", lambda means, vars, about, own: (means, vars)),
    "ranges of the rank's own images": ("ranges", ranks, "extremes", lambda x: x),
    "histogram of the rank's own images": ("histogram", ranks, "add_up", lambda tensors: None),
    "shares all alike": ("noise", ranks, "share", lambda own: 1 / ranks.count()),
    "steps' gradients by the rank's own count": ("learned steps", ranks, "numel", lambda x: x.numel()),
    "masks of the rank's own": ("block", ranks, "rows", lambda own: own),
    "all images on all ranks": ("noise", ranks, "shard", lambda batch: batch),
}


def work(rank: int, count: int, folder: Path, seeds: range) -> None:
    """Be a rank of a group that computes all of it, and leave what comes out in a file."""
    torch.set_num_threads(1)
    if count > 1:
        join(rank, count, folder)
    with ranks.one_run():
        results: dict[Any, dict[str, Tensor]] = {
            (name, seed): case(seed) for name, case in CASES.items() for seed in seeds
        }
        results |= {("trained", seed): trained(seed) for seed in seeds}
        if count == 1:
            results |= {("reversed", seed): trained(seed, reverse=True) for seed in seeds}
        results["interrupted", 0] = interrupted(folder, count)
        if count > 1:
            again = {"run.checkpointing": True}
            results["order", 0] = {"kept": order(), "computed again": order(**again)}
        if count == 2:
            for name, (case, of, attribute, instead) in BUGS.items():
                with mock.patch.object(of, attribute, instead):
                    results |= {(name, seed): CASES[case](seed) for seed in seeds}
    torch.save(results, folder / f"{count}-{rank}.pt")


def join(rank: int, count: int, folder: Path, seconds: int = 60, backend: str = "gloo") -> None:
    method, timeout = f"file://{folder}/group-{count}", timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=method, rank=rank, world_size=count, timeout=timeout)


# --- what goes wrong ---


def train(rank: int, count: int, folder: Path, fault: str) -> None:
    """Be a rank of a run in which something happens in iteration 7, and leave in words how it ended."""
    torch.set_num_threads(1)
    join(rank, count, folder, seconds=8 if fault == "late" else 60)
    trainer = new_trainer(**{"run.checkpoint_every": 5, "run.log_every": 1})
    step = trainer.step

    def step_and_fault() -> None:
        step()
        if trainer.iteration == 7:
            FAULTS[fault](rank)

    trainer.step = step_and_fault  # type: ignore[method-assign]
    try:
        with ranks.one_run():
            TrainingRun(trainer, folder if ranks.is_first() else None, {}).train(False)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{trainer.iteration} {type(error).__name__}: {error}")


def _raise(rank: int) -> None:
    if rank == 1:
        raise ValueError("planted")


def _send(number: int, rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), number)


def _be_killed_in_backward(rank: int) -> None:
    if rank == 1:
        ranks._begin_to_add_up = lambda tensors: _send(signal.SIGKILL, rank)


def _fill_disk(rank: int) -> None:
    if rank == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _be_late(rank: int) -> None:
    if rank == 1:
        time.sleep(20)


FAULTS: dict[str, Callable[[int], None]] = {
    "raised": _raise,
    "killed": functools.partial(_send, signal.SIGKILL),
    "killed in backward": _be_killed_in_backward,
    "terminated": functools.partial(_send, signal.SIGTERM),
    "full disk": _fill_disk,
    "late": _be_late,
}


def make_bank(rank: int, count: int, folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Be a rank of a run that makes a bank, and leave in words how it ended."""
    torch.set_num_threads(1)
    if count > 1:
        join(rank, count, folder)
    try:
        gdfq.quantize(
            new_model(), Config.load("cifar", settings), run_dir=folder / "run", resume=resume, progress=False
        )
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


# --- the command line ---


def command(rank: int, count: int, folder: Path, port: int, arguments: list[str]) -> None:
    """Be a rank that torchrun has started with `python -m gdfq`, its output in files."""
    torch.set_num_threads(1)
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in started.items()}
    sys.argv = ["gdfq", *arguments]
    sys.stdout, sys.stderr = ((folder / f"{rank}.{name}").open("w", buffering=1) for name in ("out", "err"))
    main()


def reproduction(rank: int, count: int, folder: Path, port: int, arguments: list[str]) -> None:
    """The same, with a few of the shipped images."""
    images = Subset(demo.test_set(), range(50))
    with mock.patch.multiple(sources, test_set=lambda: images, SHIPPED_FOR_TRAINING=30):
        command(rank, count, folder, port, arguments)
