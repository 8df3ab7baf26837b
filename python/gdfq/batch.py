"""What an image source gives and the student is trained on."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only


def labels_of(targets: Tensor) -> Tensor:
    """`(N,)` int64: the likeliest class of soft targets, and labels as they are."""
    return targets if targets.dim() == 1 else targets.argmax(1)


class Batch(NamedTuple):
    """Images, and what they are to be taken for.

    Attributes:
        images: `(N, C, H, W)` float32, normalized as the model was trained.
        targets: labels `(N,)` int64, or soft targets `(N, classes)` float32 that add up to one.
        teacher_logits: z_P `(N, classes)`, so that the teacher runs once.
        weights: `(N,)` float32, of each image's cross-entropy; None: all one.
        readings: what the student's loss reads of the teacher in the same forward pass (see `gdfq.graph.teacher`).
    """

    images: Tensor
    targets: Tensor
    teacher_logits: Tensor
    weights: Tensor | None = None
    readings: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody writes to

    @property
    def labels(self) -> Tensor:
        return labels_of(self.targets)

    def detached(self) -> "Batch":
        """The same without gradients to what made the images."""
        return tree_map_only(Tensor, Tensor.detach, self)
