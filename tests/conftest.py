"""Fixtures of more than one folder."""

import sys

import pytest

from gdfq import cli


@pytest.fixture
def gdfq(monkeypatch, capsys):
    """Run the command line in this process: `gdfq(*arguments)` gives exit code, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gdfq", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
