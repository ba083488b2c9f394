"""Fixtures of the integration tests, and the figures they print at the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests.integration.fleet import Fleet

MEASURED = "measured"
figures: list[str] = []


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Takes sentences with what was measured; printed when the session ends."""
    lines: list[str] = []
    yield lines
    # With the test's own report, which reaches the process that prints them also from where tests run side by side.
    name = request.node.name.removeprefix("test_")
    request.node.user_properties.extend((MEASURED, f"{name}: {line}") for line in lines)


@pytest.fixture
def fleet(tmp_path: Path, cluster: Cluster, guard: Guard) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, cluster, guard)
    yield fleet
    fleet.close()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        figures.extend(str(value) for key, value in report.user_properties if key == MEASURED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures:
        terminalreporter.section("measured")
        for line in figures:
            terminalreporter.line(line)
