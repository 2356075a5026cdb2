"""pytest's hooks: our table at the end instead of pytest-benchmark's, which -v brings back."""

from pathlib import Path

import pytest

from benchmarks import gpu, report, requirements
from benchmarks.cases import CASES
from benchmarks.runner import MEASURED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=list(CASES), default="cpu", help="where to time fastvae")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options when it is configured
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requirement: asserts a stated speed-up, as a ratio")
    config.option.benchmark_quiet = True
    config.option.showcapture = "no"  # at a failure: thousands of log lines from torch.compile
    if config.getoption("device", "cpu") == "cuda":
        if reason := gpu.obstacle():
            raise pytest.UsageError(reason)
        # What torch.compile and drivers warn of differs by machine, and is no error.
        config.addinivalue_line("filterwarnings", "default")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if requirements.OUTCOMES:
        terminalreporter.section("fastvae requirements")
        terminalreporter.write("\n".join([report.environment(), *requirements.lines()]) + "\n")
    if not MEASURED:
        return
    terminalreporter.section("fastvae benchmarks")
    terminalreporter.write("\n".join(report.lines(MEASURED)) + "\n")
    if not config.getoption("benchmark_json", None):  # `make bench` gives one
        return
    from benchmarks import plot  # matplotlib

    on_gpu = config.getoption("device", "cpu") == "cuda"
    name = report.gpu_name() if on_gpu else report.environment()
    picture = Path(__file__).parents[1] / "docs" / ("gpu.png" if on_gpu else "cpu.png")
    if plot.draw(MEASURED, name, picture):
        terminalreporter.write(f"plot: {picture}\n")
