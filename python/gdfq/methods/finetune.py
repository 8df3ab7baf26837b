"""FT of the paper's Table 1: Q trained as GDFQ trains it (Eq. 10), but on real labeled images: what data would buy.

With the optimizer, losses, milestones and length of GDFQ: the activation ranges are observed in the first
`schedule.range_epochs`, all later epochs train Q. There is no generator to warm up, and no reason to take ranges from
real images twice. The data-free figures, of which nothing is chosen, are those of Gaussian noise.
"""

from gdfq.images.real import RealImages
from gdfq.methods.method import TRAINING_SIZES, Data, Method, Outcome, Task, training_amount
from gdfq.methods.training import train


def finetune(task: Task) -> Outcome:
    schedule = task.config.schedule
    changes = {"warmup_epochs": schedule.range_epochs, "reestimate_ranges": False}
    config = task.config.model_copy(update={"schedule": schedule.model_copy(update=changes)})
    shape, num_classes = task.captured.image_shape, task.captured.num_classes
    source = RealImages(task.train_on, task.teacher, shape, num_classes, config, task.device)
    trainer, seconds = train(task, source, config)
    return Outcome(
        source.held_out(),
        seconds,
        selected="trained",
        choice=trainer.choice,
        choice_state=trainer.choice_state,
        iterations=trainer.runner.description,
        same_source=False,
    )


FINETUNE = Method(
    "finetune",
    "Q trained as gdfq does, but on real images",
    finetune,
    Data.LABELED,
    trains=True,
    amount=training_amount,
    sizes=TRAINING_SIZES,
)
