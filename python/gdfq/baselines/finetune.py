"""FT of the paper's Table 1: Q trained as GDFQ trains it (Eq. 10), but on real labelled images: what data would buy."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gdfq.baselines.images import TrainingImages, gaussian
from gdfq.config import Config
from gdfq.graph import CapturedModel, Teacher
from gdfq.modules import observing
from gdfq.precision import products_in_tf32
from gdfq.trainer import Trainer


class FineTuner(Trainer):
    """Algorithm 1 with real images and labels in place of G's, and G never trained.

    With the optimizer, losses, milestones and length of GDFQ: the activation ranges are observed in the first
    `schedule.range_epochs`, all later epochs train Q. There is no generator to warm up, and no reason to take ranges
    from real images twice. The data-free figures, of which nothing is chosen, are those of Gaussian noise.

    Args:
        teacher, student, captured, config: see `Trainer`.
        images: whose batches it trains on.
    """

    def __init__(
        self, teacher: Teacher, student: nn.Module, captured: CapturedModel, config: Config, images: TrainingImages
    ) -> None:
        schedule = {"warmup_epochs": config.schedule.range_epochs, "reestimate_ranges": False}
        config = config.model_copy(update={"schedule": config.schedule.model_copy(update=schedule)})
        super().__init__(teacher, student, captured, config)
        self.training_images = images
        self.image_shape = captured.image_shape

    def _step(self) -> None:
        """Eagerly, whatever `run.execution` says: images come from the host."""
        images, labels = self.training_images.batch(self.iteration)
        with products_in_tf32(self.config.run.precision == "tf32"):
            with torch.no_grad(), self._autocast():
                if self.phase == "ranges":
                    with observing(self.student):
                        self.student(images)
                    return
                teacher_logits = self.teacher(images)
            self._student_step(images, teacher_logits, labels)

    def held_out_images(self) -> Iterator[Tensor]:
        return iter(gaussian(self.image_shape, self.config, self.device).held_out)
