"""What docs/ shows is run as it stands there, beside a `make up`, and answers what it says there."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local.cluster import GATEWAY
from deploy.local.guard import Guard
from tests import debian
from tests.integration.fleet import ROOT, Fleet
from tests.up import Local, free_ports_from
from tests.waiting import eventually

DOC = (ROOT / "docs" / "services.md").read_text()
PROGRAMS = re.findall(r"```python\n([^`]*)```\n\n```text\n([^`]*)```", DOC)
(SERVER,) = [each for each in re.findall(r"```python\n([^`]*)```", DOC) if "jsonrpc.Service" in each]
README = (ROOT / "README.md").read_text()
CONSOLES = re.findall(r"```console\n([^`]*)```", DOC + README)


def test_nothing_that_is_shown_is_left_out() -> None:
    kinds = re.findall(r"^```(\w+)", DOC, re.MULTILINE)
    assert sorted(kinds) == sorted(["console"] * 2 + ["python"] + ["python", "text"] * len(PROGRAMS))


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard
) -> Iterator[dict[str, str]]:
    """What somebody has who has typed `make up`."""
    local = Local(tmp_path_factory.mktemp("docs"), free_ports_from(), consul_binary)
    try:
        code, out, err = local("up")
        for pid in local.pids().values():
            guard.watch(pid)
        assert code == 0, out + err
        gateway = f"http://127.0.0.1:{local.port + GATEWAY}/openapi.json"
        eventually("the gateway knows them all", lambda: len(requests.get(gateway, timeout=10).json()["tags"]) == 5, 30)
        yield {**local.env, "ROLLCALL_CONSUL": f"127.0.0.1:{local.port}", "PYTHONPATH": str(ROOT)}
    finally:
        local("down", "--purge")


@pytest.mark.parametrize(("program", "output"), PROGRAMS, ids=[output.split("\n")[0] for _, output in PROGRAMS])
def test_a_program(environment: dict[str, str], program: str, output: str) -> None:
    program = here(environment, program)
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == output


@pytest.mark.parametrize("console", CONSOLES, ids=[each.split("\n")[0] for each in CONSOLES])
def test_what_is_typed(environment: dict[str, str], console: str) -> None:
    if "| nc " in console and not shutil.which("nc"):
        debian.install("netcat-openbsd")
        if not shutil.which("nc"):
            pytest.skip("no nc on PATH, and it could not be installed here as Debian's package netcat-openbsd")
    if "curl" in console and not shutil.which("curl"):
        debian.install("curl")
        if not shutil.which("curl"):
            pytest.skip("no curl on PATH, and it could not be installed here as Debian's package curl")
    console = here(environment, console)
    typed = "\n".join(re.findall(r"^\$ (.*)", console, re.MULTILINE))
    expected = re.findall(r"^(?!\$ )(.*\n)", console, re.MULTILINE)
    with subprocess.Popen(
        ["bash", "-c", typed], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as shell:
        try:
            # No more lines than are to come: some kinds of nc end with their input, others wait for the server to.
            found = [shell.stdout.readline() for _ in expected if shell.stdout]
        finally:
            os.killpg(shell.pid, signal.SIGKILL)
    assert [alike(line) for line in found] == [alike(line) for line in expected]


def here(environment: dict[str, str], text: str) -> str:
    """Return what is shown with Consul and the gateway's first instance where they are in this test."""
    port = int(environment["CONSUL_HTTP_PORT"])
    return text.replace(":8541", f":{port + GATEWAY}").replace(":8500", f":{port}")


def alike(line: str) -> str:
    """Leave out which of its instances has answered."""
    return re.sub(r'"(\w+)-[123]"', r'"\1-N"', line)


def test_a_server_of_ones_own(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(SERVER)
    fleet.environment["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    fleet.start("hello-1", module="service")
    eventually("it passes", lambda: fleet.passing("hello") == {"hello-1"}, 20)
    ((caller, output),) = [each for each in PROGRAMS if "HELLO" in each[0]]
    ran = subprocess.run(
        [sys.executable, "-c", caller], env=fleet.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, output), ran.stderr
