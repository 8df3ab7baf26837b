"""One GDFQ iteration (a step of G, a step of Q, both optimizers) by several providers, for `step.py`.

`Gdfq` is the product: `gdfq.train.trainer.Trainer`, whose operations are the compiled ones (`ours`) or, in a process
with GDFQ_EXT=reference, pure PyTorch. `PlainPyTorch` computes the same equations without `gdfq_ext`, in several
variants. `Floor` replays nothing but the convolutions and matrix products of an iteration.

All start from the same weights, ranges, latents and generator, so that their first losses and gradients are the same
numbers. A provider's name may say how it differs from the others of the run: `ours@bfloat16`, `eager@contiguous`.
"""

from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from pytorchcv.models.vgg import VGG
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import gdfq_ext
from benchmarks.floor import Floor
from benchmarks.parts import Networks
from benchmarks.separate_layers import with_separate_layers, with_separate_quantizers
from gdfq import demo
from gdfq.calibrate import calibrate
from gdfq.config import Config, RunConfig
from gdfq.errors import GdfqError
from gdfq.graph import CapturedModel, Summary, Teacher, build_quantized, build_teacher, capture
from gdfq.images.generator import generator
from gdfq.images.noise import gaussian_images
from gdfq.models import load_model
from gdfq.train.cuda_graph import WARMUP
from gdfq.train.trainer import Trainer

SEED = 0
VGG_IMAGE_SIZE = 224
PRECISIONS = get_args(RunConfig.model_fields["precision"].annotation)
LOSSES = ("generator/cross_entropy", "generator/bns", "student/cross_entropy", "student/kl")


@dataclass(frozen=True)
class Task:
    """What is trained. The weights of every model but `demo` are random, with BN statistics that fit them."""

    model: str = "demo"
    image_size: int | None = None
    model_arguments: tuple[tuple[str, Any], ...] = ()
    preset: str = "cifar"
    bits: int = 4
    batch: int = 64
    precision: str = "float32"
    channels_last: bool = True

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def new_task(
    model: str, image_size: int | None = None, model_arguments: dict[str, Any] | None = None, preset: str | None = None,
    **rest: Any,
) -> Task:  # fmt: skip
    """A task whose model is told the image size, with the preset that is made for it unless one is given.

    Args:
        model: `demo`, or what `gdfq.models.load_model` takes.
        image_size: height and width; None is what the model says.
        model_arguments: handed to the model.
        preset: None is `cifar` for images up to 64 pixels, else `imagenet`.
        rest: of `Task`.
    """
    arguments = dict(model_arguments or {})
    if image_size is not None and model.startswith("pytorchcv:"):
        arguments.setdefault("in_size", (image_size, image_size))
    small = model == "demo" or "cifar" in model if image_size is None else image_size <= 64
    preset = preset or ("cifar" if small else "imagenet")
    return Task(model, image_size, tuple(arguments.items()), preset, **rest)


def new_model(task: Task) -> nn.Module:
    """The float model; every call gives the same weights."""
    torch.manual_seed(SEED)
    if task.model == "demo":
        return demo.teacher()
    model = load_model(task.model, **dict(task.model_arguments))
    fit_classifier(model, task.image_size)
    return fit_batch_norm(model, task.image_size or model.in_size)


def fit_classifier(model: nn.Module, image_size: int | None) -> None:
    """Exchange or add what stands before the classifier of a pytorchcv model, which takes the maps of one image size
    only and, in VGG, of one layout."""
    pool = getattr(getattr(model, "features", None), "final_pool", None)
    if isinstance(model, VGG):
        if image_size not in (None, VGG_IMAGE_SIZE):
            model.features.add_module("final_pool", nn.AdaptiveAvgPool2d(VGG_IMAGE_SIZE // 32))
        model.features.add_module("flatten", nn.Flatten())  # the model's own view() fails in channels_last
    elif image_size is not None and isinstance(pool, nn.AvgPool2d):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)


@torch.no_grad()
def fit_batch_norm(model: nn.Module, image_size: int | tuple[int, int], channels: int | None = None) -> nn.Module:
    """Set the BN statistics to those of Gaussian images, so that activations of random weights stay in range.

    `channels` are the first convolution's unless they are given.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if channels is None:
        channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in batch_norms]
    for module in batch_norms:
        module.momentum = 1.0
    model.train()(torch.randn(8, channels, *size, generator=torch.Generator().manual_seed(SEED)))
    for module, momentum in zip(batch_norms, momenta, strict=True):
        module.momentum = momentum
    return model.eval()


def new_trainer(task: Task, overrides: dict[str, Any] | None = None) -> Trainer:
    """A trainer at the first iteration of alternate training, with ranges observed on Gaussian images.

    Args:
        task: what is trained.
        overrides: settings of the provider, `{"section.key": value}`.
    """
    captured = capture(new_model(task), task.image_size, device=task.device)
    settings = {"run.precision": task.precision, "run.channels_last": task.channels_last}
    settings |= {"quantizer.weight_bits": task.bits, "quantizer.activation_bits": task.bits} | (overrides or {})
    teacher = build_teacher(captured, settings.get("run.checkpointing", False))
    return trainer_of(captured, teacher, task.preset, task.batch, settings)[0]


def trainer_of(
    captured: CapturedModel, teacher: Teacher, preset: str, batch: int, settings: dict[str, Any]
) -> tuple[Trainer, Summary]:
    """A trainer at the first iteration of alternate training, with ranges observed on Gaussian images, and what is
    quantized in its Q."""
    # One epoch of one iteration each for ranges and warm-up, which are skipped by starting behind them.
    schedule = {"epochs": 2, "iterations": 1, "range_epochs": 1, "warmup_epochs": 1, "batch_size": batch}
    defaults = {f"schedule.{key}": value for key, value in schedule.items()}
    defaults |= {"schedule.milestones": [], "schedule.reestimate_ranges": False}
    defaults |= {"method": "gdfq", "run.held_out_images": 2, "run.seed": SEED}
    config = Config.load(preset, defaults | settings)
    student, summary = build_quantized(captured, config.quantizer)
    device = next(student.parameters()).device
    calibrate(student, gaussian_images(captured.image_shape, 2 * batch, batch, SEED, device))
    trainer = Trainer(teacher, student, generator(teacher, captured, config, device), config)
    trainer.iteration = 1
    assert trainer.phase == "training"
    return trainer, summary


def gradient_norms(generator: nn.Module, student: nn.Module) -> dict[str, float]:
    """Euclidean norms over all parameters: evidence that the backward passes agree, too."""
    models = {"generator_gradient": generator, "student_gradient": student}
    return {
        name: torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for name, model in models.items()
    }


class Gdfq:
    """The trainer as users run it, or with `overrides` (see `new_trainer`)."""

    def __init__(self, task: Task, overrides: dict[str, Any] | None = None) -> None:
        self.trainer = new_trainer(task, overrides)
        trainer, source = self.trainer, self.trainer.source
        optimizers = (source.optimizer, trainer.optimizer)
        networks = Networks(source.generator, source.read.module, trainer.student, optimizers)
        run = trainer.config.run
        self.networks = None if run.compile or run.checkpointing else networks  # passes that are told apart by module

    def backend(self) -> str:
        """Which kernels run and whether from a CUDA graph, in words; to be asked after the warm-up.

        Raises:
            GdfqError: there is no graph although `overrides` ask for one.
        """
        how = self.trainer.runner.description
        if self.trainer.config.run.cuda_graph is True and how != "graph":
            raise GdfqError(f"after {WARMUP} iterations there must be a CUDA graph, but they are '{how}'")
        return f"{gdfq_ext.backend_report().cause}; iterations: {how}"

    def step(self) -> None:
        self.trainer.step()

    def evidence(self) -> dict[str, float]:
        """The losses (means since the last call) and the norms of the last gradients."""
        metrics = self.trainer.read_metrics()
        losses = {name: metrics[name] for name in LOSSES}
        return losses | gradient_norms(self.trainer.source.generator, self.trainer.student)


@dataclass(frozen=True)
class Variant:
    """How plain PyTorch runs the iteration.

    Attributes:
        frozen_teacher: false leaves P's weights trainable: their gradients are computed and never used.
        host_reads: read losses and accuracies on the host in every iteration.
        observe_ranges: also track every activation's minimum and maximum, read on the host, in every iteration, as in
            the epochs before the ranges are fixed. What is tracked is not used, so that the losses stay comparable.
        channels_last: memory format of images and weights, if the task has it, too; else contiguous.
        compile: the mode of `torch.compile` for both loss functions, if it is to compile them.
    """

    frozen_teacher: bool = True
    host_reads: bool = False
    observe_ranges: bool = False
    channels_last: bool = True
    compile: str | None = None


class PlainPyTorch:
    """Algorithm 1's iteration from the equations: BN statistics by hooks, one tensor operation per operation sign."""

    def __init__(self, task: Task, variant: Variant) -> None:
        self.variant = variant
        channels_last = variant.channels_last and task.channels_last
        trainer = new_trainer(task, {"run.channels_last": channels_last})
        self.config = config = trainer.config
        assert config.generator.bns_reduction == config.student.kd_reduction == "mean"
        assert config.quantizer.straight_through == "identity"
        assert config.student.fixed_bns
        self.device = task.device
        self.source, self.generator = trainer.source, with_separate_layers(trainer.source.generator)
        self.student = with_separate_quantizers(trainer.student, variant.observe_ranges)
        self.teacher = new_model(task).to(task.device).eval().requires_grad_(not variant.frozen_teacher)
        if channels_last:
            self.teacher.to(memory_format=torch.channels_last)
        self.moments: list[tuple[_BatchNorm, Tensor, Tensor]] = []
        for module in self.teacher.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_hook(self._note_moments)
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), config.generator.learning_rate, config.generator.betas
        )
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(), config.student.learning_rate, momentum=config.student.momentum,
            nesterov=config.student.momentum > 0, weight_decay=config.student.weight_decay,
        )  # fmt: skip
        self.generator_loss, self.student_loss = self._generator_loss, self._student_loss
        if variant.compile:
            self.generator_loss = torch.compile(self.generator_loss, dynamic=False, mode=variant.compile)
            self.student_loss = torch.compile(self.student_loss, dynamic=False, mode=variant.compile)
        optimizers = (self.generator_optimizer, self.student_optimizer)
        networks = Networks(self.generator, self.teacher, self.student, optimizers)
        self.networks = None if variant.compile else networks
        self.last: tuple[Tensor, ...] = ()

    def step(self) -> None:
        if self.variant.compile == "reduce-overhead":
            # One iteration for the CUDA graphs of both functions: Q's may not reuse the memory of G's results.
            torch.compiler.cudagraph_mark_step_begin()
        # First of all, since gradients lie in memory that a CUDA graph of torch.compile writes again.
        self.generator_optimizer.zero_grad()
        self.student_optimizer.zero_grad()
        noise, labels = self.source.latents(self.config.schedule.batch_size, self.source.random)
        loss, images, teacher_logits, cross_entropy, bns = self.generator_loss(noise, labels)
        loss.backward()
        self.generator_optimizer.step()
        loss, student_logits, student_cross_entropy, kl = self.student_loss(images, teacher_logits, labels)
        loss.backward()
        self.student_optimizer.step()
        self.last = cross_entropy, bns, student_cross_entropy, kl
        if self.variant.host_reads:
            self._losses()
            for logits in (teacher_logits, student_logits):
                (logits.argmax(1) == labels).float().mean().item()

    def backend(self) -> str:
        """To be asked after the warm-up, when torch.compile has met what it cannot capture."""
        words = f"PyTorch, torch.compile in mode {self.variant.compile}" if self.variant.compile else "PyTorch"
        if self.variant.compile == "reduce-overhead":
            skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
            words += f"; compiled functions without a CUDA graph: {skipped}"
        return words

    def evidence(self) -> dict[str, float]:
        """The losses of the last iteration and the norms of its gradients."""
        return self._losses() | gradient_norms(self.generator, self.student)

    def _losses(self) -> dict[str, float]:
        return {name: value.item() for name, value in zip(LOSSES, self.last, strict=True)}

    def _autocast(self) -> torch.autocast:
        """Convolutions and linear layers inside the block run in the task's precision."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.config.run.precision == "bfloat16")

    def _note_moments(self, module: _BatchNorm, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        x = x.float()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        self.moments.append((module, x.mean(dims), x.var(dims, correction=0)))

    def _generator_loss(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """CE(z_P, y) + beta * BNS (Eq. 4, 5); also images, z_P and the two parts, detached: a compiled function's
        backward pass takes a gradient for each of its results that has one."""
        with self._autocast():
            images = self.generator(noise, labels)
            logits = self.teacher(images).float()
        cross_entropy = F.cross_entropy(logits, labels)
        bns = torch.zeros((), device=images.device)
        for module, mean, var in self.moments:
            bns = bns + F.mse_loss(mean, module.running_mean) + F.mse_loss(var, module.running_var)
        bns = bns / len(self.moments)
        self.moments.clear()  # what is left in it would be one more result of a compiled function
        weights = self.config.generator
        loss = weights.cross_entropy_weight * cross_entropy + weights.bns_weight * bns
        return loss, images.detach(), logits.detach(), cross_entropy.detach(), bns.detach()

    def _student_loss(self, images: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """CE(z_Q, y) + gamma * T^2 * KL (Eq. 7 to 10); also z_Q and the two parts, detached."""
        weights = self.config.student
        with self._autocast():
            logits = self.student(images).float()
        cross_entropy = F.cross_entropy(logits, labels)
        soft = F.softmax(teacher_logits / weights.temperature, 1)
        kl = F.kl_div(F.log_softmax(logits / weights.temperature, 1), soft, reduction="sum") / logits.numel()
        loss = weights.cross_entropy_weight * cross_entropy
        loss = loss + weights.distillation_weight * weights.temperature**2 * kl
        return loss, logits.detach(), cross_entropy.detach(), kl.detach()


RELEASED = Variant(frozen_teacher=False, host_reads=True, channels_last=False)
PROVIDERS = {
    "released-observing": lambda task: PlainPyTorch(task, replace(RELEASED, observe_ranges=True)),
    "released": lambda task: PlainPyTorch(task, RELEASED),
    "eager": lambda task: PlainPyTorch(task, Variant()),
    "compile": lambda task: PlainPyTorch(task, Variant(compile="default")),
    "compile-reduce-overhead": lambda task: PlainPyTorch(task, Variant(compile="reduce-overhead")),
    "reference": Gdfq,
    "ours": Gdfq,
    "ours-eager": lambda task: Gdfq(task, {"run.cuda_graph": False}),
    "ours-graph": lambda task: Gdfq(task, {"run.cuda_graph": True}),
    "ours-checkpointing": lambda task: Gdfq(task, {"run.checkpointing": True}),
    "ours-compile": lambda task: Gdfq(task, {"run.compile": True}),
    "floor": lambda task: Floor(Gdfq(task).trainer),
}
DEFAULT = ("released", "eager", "compile", "reference", "ours", "floor")
# These need what not every machine has; the others can only lack memory.
OPTIONAL = {"compile", "compile-reduce-overhead", "ours-compile", "ours-graph"}
# What may stand behind a provider's name -> what it changes in the task for that provider.
CHANGES = {
    **{f"@{precision}": {"precision": precision} for precision in PRECISIONS},
    "@contiguous": {"channels_last": False},
}


def parse_provider(name: str) -> tuple[str, dict[str, Any]]:
    """The entry of `PROVIDERS` that `name` means, and what it changes in the task: `ours@tf32@contiguous`.

    Raises:
        ValueError: there is no such provider, or no such change.
    """
    provider, *suffixes = name.split("@")
    changes = [CHANGES.get(f"@{suffix}", {}) for suffix in suffixes]
    merged = {key: value for change in changes for key, value in change.items()}
    if provider not in PROVIDERS or not all(changes) or len(merged) < len(changes):
        raise ValueError(
            f"{name} is not known; allowed are {', '.join(PROVIDERS)}, each also with "
            f"{', '.join(list(CHANGES)[:-1])} (one of them) and {list(CHANGES)[-1]} behind it"
        )
    return provider, merged


def task_of(name: str, task: Task) -> Task:
    """`task` as the provider of that name carries it out."""
    return replace(task, **parse_provider(name)[1])


def new_provider(name: str, task: Task) -> Gdfq | PlainPyTorch | Floor:
    return PROVIDERS[parse_provider(name)[0]](task_of(name, task))
