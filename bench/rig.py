"""What is measured: three Consul servers and the processes around them, all gone when the benchmark ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from deploy.local import LocalError
from deploy.local.cluster import Cluster, free_ports
from deploy.local.consul_binary import consul_binary
from deploy.local.guard import Guard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[1]
START_SECONDS = 20.0
ANSWER_SECONDS = 60.0


class Child:
    """A process of the benchmark, its log file, and lines of JSON to and from it."""

    def __init__(self, rig: Rig, name: str, module: str, *arguments: str, environment: dict[str, str]) -> None:
        self.name = name
        self.log = rig.run / f"{name}.log"
        with self.log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        rig.guard.watch(self._popen.pid)
        self.process = psutil.Process(self._popen.pid)

    def cpu(self) -> float:
        """Return the CPU seconds it has used, in all its threads, so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    def ask(self, question: Any) -> Any:
        """Send a line and return the line that answers it."""
        if not self._popen.stdin:
            raise RuntimeError("a child has a pipe")
        self._popen.stdin.write(json.dumps(question) + "\n")
        self._popen.stdin.flush()
        return self.read()

    def read(self) -> Any:
        """Return what its next line says."""
        hung = threading.Timer(ANSWER_SECONDS, self._popen.kill)  # which ends the line that is waited for
        hung.start()
        try:
            line = self._popen.stdout.readline() if self._popen.stdout else ""
        finally:
            hung.cancel()
        if not line:
            raise LocalError(f"{self.name} should have answered, but ended; its log:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def logged(self, pattern: Callable[[str], Any], what: str) -> Any:
        """Wait until `pattern` finds something in its log, and return that."""
        deadline = time.monotonic() + START_SECONDS
        while not (found := pattern(self.log.read_text())):
            if time.monotonic() > deadline or not self.process.is_running():
                last = self.log.read_text()[-2000:]
                raise LocalError(f"{self.name} should have {what}, but has not; its log:\n{last}")
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()


class Rig:
    """Three Consul servers on free ports, and the children; a context manager that ends them all."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.guard = stack.enter_context(Guard())
            self.cluster = stack.enter_context(
                Cluster(self.run, free_ports(), consul_binary(), on_start=self.guard.watch)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def consul(self) -> str:
        """The Consul servers as ROLLCALL_CONSUL names them."""
        return ",".join(self.cluster.addresses)

    def child(self, name: str, module: str, *arguments: str) -> Child:
        """Start `python -m module`, with the environment that leads it to this Consul."""
        return Child(self, name, module, *arguments, environment={"ROLLCALL_CONSUL": self.consul})

    def instances(self, ids: Sequence[str]) -> list[Child]:
        """Start instances side by side, `sum-1` being one of sum, and wait until each is registered."""
        started = [self.child(id_, f"services.{id_.partition('-')[0]}", "--id", id_) for id_ in ids]
        for child in started:
            child.logged(lambda text: "is registered" in text, "registered")
        return started


def pin(child: Child | int, core: int) -> None:
    """Keep a process on one core, where the system can: two that share their cores disturb each other's measurement."""
    process = psutil.Process(child) if isinstance(child, int) else child.process
    if hasattr(process, "cpu_affinity"):
        allowed = psutil.Process().cpu_affinity()
        process.cpu_affinity([allowed[core % len(allowed)]])
