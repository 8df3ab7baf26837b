"""The command line, a file for each command."""

from gdfq.cli import quantize, export, evaluate, about, reproduce  # noqa: F401, I001 - in the order of the help
from gdfq.cli.app import app, main

__all__ = ["app", "main"]
