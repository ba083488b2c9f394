"""Processes with a record: found again by it, never mistaken for a stranger, stopped within a bound."""

import dataclasses
import sys
from pathlib import Path

import psutil
import pytest

from deploy.local import process
from tests.waiting import eventually


@pytest.fixture
def sleeper(tmp_path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN201
    started = process.start("sleeper", ["sleep", "600"], run=tmp_path)
    yield started
    started.kill()


def test_a_process_is_found_by_its_record_until_it_ends(tmp_path: Path, sleeper: process.Process) -> None:
    assert process.running(tmp_path, "sleeper") == sleeper
    assert process.all_recorded(tmp_path) == [sleeper]
    assert sleeper.stop(5)
    assert process.running(tmp_path, "sleeper") is None
    process.forget(tmp_path, "sleeper")
    assert process.all_recorded(tmp_path) == []


def test_a_stranger_with_the_same_pid_is_left_alone(sleeper: process.Process) -> None:
    stranger = dataclasses.replace(sleeper, create_time=sleeper.create_time - 60)
    assert not stranger.running()
    stranger.kill()
    assert sleeper.running()


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = process.start("deaf", ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"], run=tmp_path)
    while "deaf" not in deaf.tail():  # the trap is set
        assert deaf.running()
    assert not deaf.stop(0.2)
    assert not deaf.running()


def test_one_whose_first_thread_has_ended_runs_until_the_last_has(tmp_path: Path) -> None:
    """A zombie then, to those who look at the process alone; its ports are still taken."""
    program = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    headless = process.start("headless", [sys.executable, "-c", program], run=tmp_path)
    try:
        if sys.platform == "linux":
            eventually("its first thread has ended", lambda: psutil.Process(headless.pid).status() == "zombie")
        assert headless.running()
    finally:
        headless.kill()
    assert not headless.running()
    assert not psutil.pid_exists(headless.pid)


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "odd.json").write_text("{")
    assert process.recorded(tmp_path, "odd") is None
