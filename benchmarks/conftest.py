"""pytest's hooks: our table at the end instead of pytest-benchmark's, which -v brings back."""

import pytest

from benchmarks import report
from benchmarks.runner import MEASURED


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options when it is configured
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requirement: asserts a stated speed-up, as a ratio")
    config.option.benchmark_quiet = True
    config.option.showcapture = "no"  # at a failure: thousands of log lines from torch.compile


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("fastvae benchmarks")
        terminalreporter.write("\n".join(report.lines(MEASURED)) + "\n")
