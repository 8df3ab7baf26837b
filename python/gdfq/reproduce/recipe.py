"""From a cell of a table to the configuration that makes its figure."""

from typing import Any

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.registry import METHODS
from gdfq.reproduce.scale import scaled
from gdfq.reproduce.tables import Cell


def recipe(cell: Cell, seed: int = 0, scale: float = 1.0, settings: dict[str, Any] | None = None) -> Config:
    """The preset of the cell's network, then the user's settings, then what the cell is about.

    Args:
        scale: factor on all epochs and on ZeroQ's iterations; every phase keeps at least one epoch.
        settings: `{"section.key": value}`.

    Raises:
        GdfqError: an unknown setting, a value out of range, or epochs that leave none in which Q is trained.
    """
    of_cell = {
        "method": cell.method,
        "quantizer.weight_bits": cell.bits,
        "quantizer.activation_bits": cell.bits,
        "run.seed": seed,
        **cell.settings,
    }
    config = Config.load(cell.network.preset, {**(settings or {}), **of_cell})
    if METHODS[cell.method].trains and config.schedule.epochs <= _first_trained_epoch(config):
        raise GdfqError(
            f"setting 'schedule.epochs' = {config.schedule.epochs} leaves no epoch in which Q is trained: "
            f"'schedule.warmup_epochs' and 'schedule.range_epochs' take {_first_trained_epoch(config)}; raise the one "
            "or lower the others"
        )
    if cell.separate:
        config = trained_separately(config)
    return config if scale == 1 else shortened(config, scale)


def owned_settings(cells: tuple[Cell, ...]) -> set[str]:
    """What the cells decide themselves, and a user may therefore not set."""
    always = {"method", "quantizer.weight_bits", "quantizer.activation_bits", "run.seed"}
    return always.union(*(cell.settings for cell in cells))


def trained_separately(config: Config) -> Config:
    """G alone for as many epochs as it is trained otherwise, then Q alone for as many as Q is, its milestones moved
    along: the same steps of both, one after the other."""
    schedule = config.schedule
    delay = schedule.epochs - _first_trained_epoch(config)
    return _with_schedule(
        config,
        epochs=schedule.epochs + delay,
        warmup_epochs=schedule.epochs,
        generator_epochs=schedule.epochs,
        milestones=tuple(milestone + delay for milestone in schedule.milestones),
    )


def shortened(config: Config, scale: float) -> Config:
    """All epochs and ZeroQ's iterations times `scale`."""
    schedule = config.schedule
    phases = {name: scaled(getattr(schedule, name), scale) for name in ("warmup_epochs", "range_epochs")}
    if schedule.generator_epochs is not None:
        phases["generator_epochs"] = scaled(schedule.generator_epochs, scale)
    milestones = sorted({scaled(milestone, scale) for milestone in schedule.milestones})
    epochs = max(scaled(schedule.epochs, scale), max(phases.values()) + 1)
    config = _with_schedule(config, epochs=epochs, milestones=tuple(milestones), **phases)
    iterations = scaled(config.zeroq.iterations, scale)
    return config.model_copy(update={"zeroq": config.zeroq.model_copy(update={"iterations": iterations})})


def _first_trained_epoch(config: Config) -> int:
    return max(config.schedule.warmup_epochs, config.schedule.range_epochs)


def _with_schedule(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"schedule": config.schedule.model_copy(update=values)})
