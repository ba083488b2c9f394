"""docs/your-own-service.md, typed from top to bottom beside a `make up`, in a copy of this repository."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local.cluster import GATEWAY
from deploy.local.guard import Guard
from tests import making
from tests.making import OUTSIDE, SECONDS
from tests.tutorial import ON_KUBERNETES, PAGE, REST, Typed, typed
from tests.up import Local, free_ports_from

CALLER = re.compile(r"As `(\w+\.py)`:\n\n```python\n([^`]*)```")
LOOKS = ("rollcall call", "rollcall health", "curl")
"""What only looks: may be typed again, until what has been started is there."""
LOOK_SECONDS = 60.0
PAUSE = 0.2  # seconds between two looks


class Terminal:
    """Types commands into a shell in a folder; what runs on in the background ends with it."""

    def __init__(self, folder: Path, port: int, env: dict[str, str], guard: Guard) -> None:
        self._folder, self._port, self._env, self._guard = folder, port, env, guard

    def type(self, typed: Typed) -> None:
        deadline = time.monotonic() + LOOK_SECONDS
        while True:
            code, printed, complaint = self._run(typed.command.replace(":8541", f":{self._port + GATEWAY}"))
            if typed.is_answered_by(printed):
                # What is to fail is shown with what it complains of.
                assert code == 0 or "2>&1" in typed.command, f"$ {typed.command}\nexit code {code}: {complaint}"
                return
            again = any(look in typed.command for look in LOOKS) and time.monotonic() < deadline
            assert again, f"$ {typed.command}\nexpected {typed.shown}\nfound {printed.splitlines()}\n{complaint}"
            time.sleep(PAUSE)

    def _run(self, command: str) -> tuple[int, str, str]:
        with subprocess.Popen(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as shell:
            self._guard.watch(shell.pid)
            try:
                out, err = shell.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(shell.pid, signal.SIGKILL)
                raise
        return shell.returncode, out, err


@pytest.fixture
def terminal(tmp_path: Path, consul_binary: Path, guard: Guard) -> Iterator[Terminal]:
    local = Local(tmp_path / "run", free_ports_from(), consul_binary)
    folder = making.copy(tmp_path)
    (folder / ".run").mkdir()
    try:
        code, out, err = local("up")
        for pid in local.pids().values():
            guard.watch(pid)
        assert code == 0, out + err
        env = {**OUTSIDE, "ROLLCALL_CONSUL": f"127.0.0.1:{local.port}", "ROLLCALL_DRAIN": "0.5"}
        yield Terminal(folder, local.port, env, guard)
    finally:
        local("down", "--purge")


def test_every_command_works_as_typed(terminal: Terminal, tmp_path: Path) -> None:
    ((name, program),) = CALLER.findall(PAGE)
    (tmp_path / "rollcall" / name).write_text(program)
    for each in typed(PAGE + REST):
        terminal.type(each)


def test_nothing_that_is_shown_is_left_out() -> None:
    page = PAGE + ON_KUBERNETES + REST
    assert sorted(set(re.findall(r"^```(\w+)", page, re.MULTILINE))) == ["console", "python"]
    assert len(CALLER.findall(page)) == page.count("```python") == 1
    assert re.findall(r"(?m)^    (\S.*)$", page.split("```")[0]) == ["make up"]
