"""Property tests draw the same examples in every run, and are not timed: CI machines are noisy."""

import signal

import pytest
from hypothesis import settings

from runner.config.schema import CpuMatmul
from runner.precision import cpu_matmul
from tests.promises import PROMISES, TRAPS

# What the trainers and engines under test are compared with takes the way that they take.
cpu_matmul.install(CpuMatmul.auto)

settings.register_profile("runner", derandomize=True, deadline=None)
settings.load_profile("runner")

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that send Ctrl-C would send it
# into the void.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_skipped_files: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember files that skip themselves because a package is missing."""
    if report.skipped:
        _skipped_files.append(report.nodeid)


@pytest.hookimpl(tryfirst=True)  # before -m and -k take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fail when a test keeps a promise that nobody made or, where all files were collected, when a promise has no test."""
    promises = PROMISES + TRAPS
    kept = {mark.args[0]: item.nodeid for item in items for mark in item.iter_markers("promise")}
    problems = [f"{node}: {text!r} does not stand in tests/promises.py" for text, node in kept.items() if text not in promises]
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not _skipped_files:
        problems += [f"no test keeps {text!r}" for text in promises if text not in kept]
    if problems:
        raise pytest.UsageError("\n".join(problems))
