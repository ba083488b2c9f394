"""What the README shows is run as it stands there."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.fleet import ROOT, Fleet, eventually
from tests.waiting import free_port

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def run(fleet: Fleet, tmp_path: Path) -> "Run":
    return Run(fleet, tmp_path)


class Run:
    """Runs a program of the README, against the cluster of the test."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self._fleet, self._folder = fleet, folder

    def __call__(self, program: str) -> str:
        file = self._folder / "program.py"
        file.write_text(program)
        ran = subprocess.run(
            [sys.executable, file],
            env={**self._fleet.environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout


def test_the_service_in_20_lines_and_its_caller(fleet: Fleet, run: Run, tmp_path: Path) -> None:
    service, caller, _ = PROGRAMS
    assert service.count("\n") <= 20
    (tmp_path / "service.py").write_text(service)
    fleet.environment["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    fleet.start("sum-1", module="service")
    asyncio.run(fleet.pass_all("sum", 1))
    assert run(caller) == "999\n"


def test_the_registry_by_itself(fleet: Fleet, run: Run) -> None:
    *_, program = PROGRAMS
    assert run(program.replace("8999", str(free_port()))) == "res: 999\n\n"
    asyncio.run(eventually("it is gone", lambda: not fleet.registry.instances("grpc And consul")))
