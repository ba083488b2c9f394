"""What holds for every test, those in tests/ and those of the services."""

import os
import signal
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.postgres import PostgreSQL


def pytest_configure() -> None:
    """Let what tests start be interrupted, also in the background of a shell, where SIGINT is ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything has to be tested, with CI=true, a test that is skipped has failed."""
    report = yield
    if not hasattr(report, "wasxfail"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """And so has a module that skips all its tests."""
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("CI") == "true":
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and with CI=true nothing may be: {reason}"


@pytest.fixture(scope="session")
def postgres() -> Iterator["PostgreSQL"]:
    """Run one PostgreSQL server for the session; each test makes a database of its own."""
    # Not above: the tests of a service that has no database need no client of one.
    from tests.postgres import running  # noqa: PLC0415

    with running() as server:
        yield server
