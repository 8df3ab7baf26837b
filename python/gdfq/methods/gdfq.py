"""GDFQ: Q trained on images of a source that learns along with it (Algorithm 1)."""

from gdfq.calibrate import calibrate
from gdfq.evaluate import agreement
from gdfq.graph import build_quantized
from gdfq.images.generator import GeneratorImages
from gdfq.methods.method import TRAINING_SIZES, Method, Outcome, Task, training_amount
from gdfq.methods.training import images_of, train
from gdfq.train.trainer import Trainer


def gdfq(task: Task) -> Outcome:
    source = images_of(task)
    trainer, seconds = train(task, source, task.config)
    return Outcome(
        source.held_out(),
        seconds,
        generator=source.generator if isinstance(source, GeneratorImages) else None,
        selected="calibrated" if _calibration_is_better(task, trainer) else "trained",
        choice=trainer.choice,
        choice_state=trainer.choice_state,
        iterations=trainer.runner.description,
    )


def _calibration_is_better(task: Task, trainer: Trainer) -> bool:
    """Take plain calibration over where it is better by a data-free criterion.

    From 6 bits on published GDFQ can fall below it (ResNet-18 at W8A8); the criterion is the KL on held-out images.
    """
    quantizer, schedule = task.config.quantizer, task.config.schedule
    if not schedule.compare_with_calibration or quantizer.fewest_bits < 6:
        return False
    calibrated, _ = build_quantized(task.captured, quantizer)
    calibrate(calibrated, trainer.source.batches(schedule.range_images))
    trained = trainer.held_out_agreement()
    if agreement(task.teacher, calibrated, trainer.source.held_out()).kl >= trained.kl:
        return False
    task.student.load_state_dict(calibrated.state_dict())
    return True


GDFQ = Method(
    "gdfq",
    "Q trained on images of a generator that learns along with it",
    gdfq,
    source="generator",
    trains=True,
    amount=training_amount,
    sizes=(*TRAINING_SIZES, "run.checkpointing"),
)
