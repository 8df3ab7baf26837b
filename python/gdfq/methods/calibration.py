"""Methods without training: what they do with images, and which ones; and plain calibration."""

import time
from collections.abc import Callable, Iterable

from torch import Tensor, fx

from gdfq.calibrate import calibrate
from gdfq.clip_values import Rule
from gdfq.graph import quantizer_of
from gdfq.graph.nodes import is_image
from gdfq.images.real import calibration_batches
from gdfq.methods.method import Data, Method, Outcome, Task
from gdfq.methods.training import images_of, learned, source_of
from gdfq.nn import FakeQuantize
from gdfq.observers import Histogram


def calibrating(
    apply: Callable[[Task, Iterable[Tensor]], None], source: str | None = None
) -> Callable[[Task], Outcome]:
    """A method that does `apply(task, batches)` with calibration images.

    Args:
        source: of the images; None: the user's, or those that the settings choose.
    """

    def run(task: Task) -> Outcome:
        start = time.monotonic()
        is_given = source is None and task.calibrate_on is not None
        if is_given:
            images = source_of(task, "gaussian")
            batches = calibration_batches(task.calibrate_on, task.captured.image_shape, task.config, task.device)
        else:
            images = learned(task, source_of(task, source) if source else images_of(task))
            batches = images.calibration()
        apply(task, batches)
        return Outcome(images.held_out(), time.monotonic() - start, same_source=not is_given)

    return run


def clipped_by(rule: Rule, student: fx.GraphModule) -> Callable[[FakeQuantize], Histogram]:
    """What `calibrate` has to observe with so that activations are clipped by a rule of `gdfq.clip_values`. The image
    keeps its minimum and maximum: pixels have few different values, and none of them is an outlier."""
    of_images = {quantizer_of(student, node) for node in student.graph.nodes if is_image(node)}
    return lambda quantizer: Histogram(None if quantizer in of_images else rule, quantizer.scheme)


def _calibrate(task: Task, batches: Iterable[Tensor]) -> None:
    calibrate(task.student, batches)


ZEROQ = Method(
    "zeroq", "no training; ranges from images optimized until the BN statistics fit", calibrating(_calibrate, "zeroq")
)
MINMAX = Method("minmax", "no training; ranges from Gaussian noise", calibrating(_calibrate, "gaussian"))
CALIBRATED = Method("calibrated", "no training; ranges from calibration images", calibrating(_calibrate), Data.IMAGES)
