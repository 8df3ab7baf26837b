"""The methods. All register themselves when their files are imported."""

from gdfq.methods import calibration, clipping, dfq, finetune, gdfq, reconstruction, squant  # noqa: F401
from gdfq.methods.method import Data, Method, Outcome, Task

__all__ = ["Data", "Method", "Outcome", "Task"]
