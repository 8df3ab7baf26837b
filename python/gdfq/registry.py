"""What the settings choose by name. The files that define a thing add it here when they are imported."""

from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Registry(dict[str, Value]):
    """Name -> what it stands for.

    Args:
        settings: those whose value, or whose keys, are names of it.
    """

    def __init__(self, *settings: str) -> None:
        super().__init__()
        self.settings = settings

    def unknown(self, value: str | dict[str, Any] | None) -> list[str]:
        """The names in a setting's value that stand for nothing."""
        return [name for name in ([value] if isinstance(value, str) else value or ()) if name not in self]


METHODS: Registry[Any] = Registry("method")  # gdfq.methods
TARGETS: Registry[Any] = Registry()  # gdfq.target, which reads its setting
SOURCES: Registry[Any] = Registry("images.source", "calibration.images")  # gdfq.images
TRANSFORMS: Registry[Any] = Registry("images.transforms")  # gdfq.images.transforms
OPTIMIZERS: Registry[Any] = Registry("student.optimizer")  # gdfq.optim
TERMS: Registry[Any] = Registry("generator.terms", "student.terms")  # gdfq.objective
ALL = (METHODS, TARGETS, SOURCES, TRANSFORMS, OPTIMIZERS, TERMS)

# Sections of the settings, by name, besides those of `gdfq.config`.
SECTIONS: dict[str, Any] = {}

# What else is asked of all settings together: called with them, raises `GdfqError`.
CHECKS: list[Callable[[Any], None]] = []
