"""`make up` and its like, as a user runs them, on ports and in a folder of their own."""

import os
import random
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from deploy.local import process
from deploy.local.cluster import SPAN, reserve


class Local:
    """The command, with its settings."""

    def __init__(self, run: Path, port: int, consul: Path) -> None:
        self.run = run
        self.port = port
        settings = {"ROLLCALL_RUN": str(run), "CONSUL_HTTP_PORT": str(port), "CONSUL_BIN": str(consul)}
        settings["ROLLCALL_DRAIN"] = "0.2"  # seconds; nobody calls these instances while they stop
        self.env = {**os.environ, **settings}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.local", *arguments],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as command:
            out, err = command.communicate(timeout=120)
            return command.returncode, out, err

    def pids(self) -> dict[str, int]:
        return {found.name: found.pid for found in process.all_recorded(self.run) if found.running()}

    def kill(self, name: str) -> None:
        """SIGKILL one of what runs, and wait until it has gone."""
        found = process.running(self.run, name)
        assert found, f"{name} does not run"
        found.kill()


def free_ports_from() -> int:
    """Return a port from which every port that follows from it is free, and this process' until it ends.

    From between those that `free_ports` gives and those that the kernel gives to outgoing connections.
    """
    for http in random.sample(range(24000, 31900, 50), 100):
        if reserve(http) and not any(map(taken, range(http, http + SPAN + 1))):
            return http
    raise AssertionError(f"expected {SPAN + 1} free ports in a row, found none from 24000 to 31900")


def taken(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with closing(socket.socket(socket.AF_INET, kind)) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return True
    return False
