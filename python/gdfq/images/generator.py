"""GDFQ's images: a generator, trained along with Q against P's BN statistics and decision boundaries (Eq. 2 to 5)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gdfq import ranks
from gdfq.batch import Batch, labels_of
from gdfq.config import Config
from gdfq.graph import CapturedModel, Teacher
from gdfq.images.networks import Generator
from gdfq.images.source import ImageSource
from gdfq.memory import images_at_once
from gdfq.nn import to_channels_last
from gdfq.objective import Averages, Outputs, generator_objective
from gdfq.optim.rates import load_optimizer_state, rate, set_rates, with_initial_rates
from gdfq.precision import autocast
from gdfq.random_state import RandomState
from gdfq.registry import SOURCES

Latents = tuple[Tensor, ...]


class GeneratorImages(ImageSource):
    """Images of a generator that learns.

    It learns until `schedule.generator_epochs`, or until the stopping condition `generator.stop_accuracy` is met.

    Args:
        teacher, shape, config, device: see `ImageSource`; the section `generator` is read, too.
        num_classes: labels are below it.
        generator: the network, `generator(*latents)` gives images.

    Attributes:
        held_out_latents: those that training never draws.
    """

    def __init__(
        self,
        teacher: Teacher,
        shape: tuple[int, int, int],
        num_classes: int,
        config: Config,
        device: torch.device,
        generator: nn.Module,
    ) -> None:
        self.objective = generator_objective(config.generator)
        super().__init__(teacher, shape, config, device)
        self.num_classes = num_classes
        self.generator = generator.to(device)
        if config.run.channels_last:
            to_channels_last(self.generator)
        self.held_out_latents = self.latents(config.run.held_out_images, RandomState(config.run.seed + 1, device))
        self.averages = Averages([*self.objective.names, "generator/accuracy"], device)
        learning_rate = config.generator.learning_rate
        self.optimizer = with_initial_rates(
            torch.optim.Adam(
                self.generator.parameters(),
                rate(learning_rate, device),
                config.generator.betas,
                fused=True,
                capturable=device.type == "cuda",
            ),
            lr=learning_rate,
        )
        if config.run.compile:
            self._forward = torch.compile(self._forward, dynamic=False)
        self.epoch = 0
        self.stopped = False

    # --- latents, and the targets that they stand for ---

    def latents(self, count: int, random: RandomState) -> Latents:
        """Noise `(count, latent_size)` ~ N(0, 1) and labels `(count,)` int64, uniform."""
        settings = {"generator": random.generator, "device": self.device}
        noise = torch.randn(count, self.config.generator.latent_size, **settings)
        return noise, torch.randint(self.num_classes, (count,), **settings)

    def targets(self, latents: Latents) -> Tensor:
        """What images of these latents are to be classified as."""
        return latents[1]

    # --- training ---

    def set_reads(self, names: Iterable[str]) -> None:
        super().set_reads(names)
        self.read = self.teacher.reader({*self.reads, *self.objective.reads}).shared()

    @property
    def learns(self) -> bool:  # type: ignore[override]
        last = self.config.schedule.generator_epochs
        return not self.stopped and (last is None or self.epoch < last)

    def step(self, count: int) -> Batch:
        """A step of G; gives the images that it was for, as they were before."""
        loss, logged, batch = self._forward(self._share(count))
        batch = batch.detached()
        hits = 100 * (batch.teacher_logits.argmax(1) == batch.labels).float().mean()
        logged.append(hits * ranks.share(len(batch.images)))
        self.optimizer.zero_grad()
        with ranks.adding_up_gradients(self.optimizer, logged):
            loss.backward()
        self.optimizer.step()
        self.averages.add(logged)
        return batch

    @torch.no_grad()
    def draw(self, count: int) -> Batch:
        return self._forward(self._share(count))[-1]

    def _share(self, count: int) -> Latents:
        """This rank's, of `count` new latents."""
        return tuple(map(ranks.shard, self.latents(count, self.random)))

    def _forward(self, latents: Latents) -> tuple[Tensor, list[Tensor], Batch]:
        targets = self.targets(latents)
        with autocast(self.config.run.precision, self.device):
            images = self.transform(self.generator(*latents))
            logits, readings = self.read(images)
        batch = Batch(images, targets, logits, readings={name: readings[name] for name in self.reads})
        return *self.objective(Outputs(batch, logits, readings)), batch

    def begin_epoch(self, epoch: int, rate: float) -> None:
        self.epoch = epoch
        set_rates(self.optimizer, rate)

    def end_epoch(self) -> None:
        """See whether the stopping condition is met."""
        enough = self.config.generator.stop_accuracy
        if enough is not None and not self.stopped:
            self.stopped = ranks.from_first(self.held_out_accuracy) > enough

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Share of the held-out images that the teacher classifies as what they were made for, percent."""
        guesses = torch.cat([self.teacher(images).argmax(1) for images in self.held_out()])
        labels = labels_of(self.targets(self.held_out_latents))
        return 100 * (guesses == labels).double().mean().item()

    def read_metrics(self) -> dict[str, float | None]:
        return self.averages.read()

    # --- images of the network as it is ---

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        latents = self.latents(count, self.random)
        return self.images_of(latents), self.targets(latents)

    @torch.no_grad()
    def images_of(self, latents: Latents) -> Tensor:
        """What G makes of latents, its running statistics left alone."""
        self.generator.eval()
        images = self.generator(*latents)
        self.generator.train()
        return self.transform(images)

    def held_out(self) -> Iterator[Tensor]:
        size = images_at_once(*self.shape[1:])
        for part in zip(*(values.split(size) for values in self.held_out_latents), strict=True):
            yield self.images_of(part)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "stopped": self.stopped,
            "sums": self.averages.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        load_optimizer_state(self.optimizer, state["optimizer"], self.device)
        self.epoch, self.stopped = state["epoch"], state["stopped"]
        self.averages.sums.copy_(state["sums"])


def generator(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> GeneratorImages:
    """With the paper's generator, its parameters drawn from the seed."""
    shape, num_classes = captured.image_shape, captured.num_classes
    network = seeded(
        config,
        device,
        lambda: Generator(shape, num_classes, config.generator, captured.pixels, config.run.checkpointing),
    )
    return GeneratorImages(teacher, shape, num_classes, config, device, network)


def seeded(config: Config, device: torch.device, make: Any) -> nn.Module:
    """What `make()` gives with torch's random state at the run's seed, which is put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.run.seed)
        return make()


@torch.no_grad()
def images_per_class(generator: Generator, num_classes: int, count: int) -> list[Tensor]:
    """`count` images `(count, C, H, W)` for each of the first `num_classes` classes, of the same noise every time."""
    device = generator.linear.weight.device
    random = torch.Generator(device).manual_seed(0)
    noise = torch.randn(count, generator.linear.in_features, generator=random, device=device)
    generator.eval()
    rows = [generator(noise, torch.full((count,), label, device=device)) for label in range(num_classes)]
    generator.train()
    return rows


SOURCES["generator"] = generator
