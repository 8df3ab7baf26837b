"""Failures are printed when they happen: a run on a GPU that is cut off has said what it found."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:  # pytest-xdist's workers have none: they send their reports to the process that has
        config.pluginmanager.register(FailuresAtOnce(terminal), "failures-at-once")


class FailuresAtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and HERE in (self.terminal.config.rootpath / report.nodeid).parents:
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}")
            self.terminal.flush()
