"""The program that commands belong to, and how it ends."""

import sys
import warnings
from typing import Any

import typer

from gdfq.errors import GdfqError

app = typer.Typer(
    help="Data-free quantization of CNNs: a trained network in, a low-bit network out, no data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line: 0 after success, 2 after an error that is the user's to mend, 130 after Ctrl-C."""
    from gdfq.run.training_run import Stopped

    warnings.formatwarning = _one_line
    try:
        if app(prog_name="gdfq", standalone_mode=False) == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except Stopped as stopped:
        leave(str(stopped), 130, stopped.is_said)
    except GdfqError as error:
        leave(f"gdfq: {error}", 2, error.is_said)
    except KeyboardInterrupt:
        leave("gdfq: interrupted", 130)
    except typer.Abort:
        leave("gdfq: aborted", 130)
    except Exception as error:
        show = getattr(error, "show", None)  # an error of usage: typer says it better
        if show is None:
            raise
        show()
        sys.exit(2)


_standard_format = warnings.formatwarning


def _one_line(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning that is meant for the user, without the line of code that it is from."""
    return f"gdfq: {message}\n" if category is UserWarning else _standard_format(message, category, *where)


def leave(message: str, code: int, is_said: bool = False) -> None:
    if not is_said:
        typer.echo(message, err=True)
    sys.exit(code)
