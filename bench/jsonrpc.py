"""hello beside Go's own net/rpc/jsonrpc, both loaded by a Go client: calls per CPU second of the server."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from bench import price
from bench.rig import ANSWER_SECONDS, pin
from deploy.local import LocalError
from tests.gojsonrpc.build import program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.rig import Rig

CONNECTIONS, CALLERS = 4, 32
ONE_THREAD = {**os.environ, "GOMAXPROCS": "1"}  # of Go code at a time: each process is kept on one core


@contextmanager
def go_server(rig: Rig) -> Iterator[tuple[int, int]]:
    """Run the server in Go; yield its process id and its port."""
    with subprocess.Popen(
        [program("server")],
        stdout=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
        start_new_session=True,  # the guard kills process groups
    ) as go:
        rig.guard.watch(go.pid)
        try:
            if not go.stdout:
                raise RuntimeError("a child has a pipe")
            yield go.pid, int(go.stdout.readline())
        finally:
            go.kill()


def hello(rig: Rig, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Load a server in Go and an instance of hello with everything on, in turns."""
    load = program("client")
    full = rig.child("hello-full", "services.hello", "--id", "hello-full")
    full.logged(lambda text: "is registered" in text, "registered")
    with go_server(rig) as (go, port):
        ports = {"go": port, "rollcall": price.port_of(full)}
        processes = {"go": psutil.Process(go), "rollcall": full.process}
        for process in processes.values():
            pin(process.pid, price.SERVER_CORE)

        def measure(variant: str) -> float:
            before = processes[variant].cpu_times()
            command = [str(load), "load", f"127.0.0.1:{ports[variant]}", f"{CONNECTIONS}", f"{CALLERS}", f"{seconds}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=ONE_THREAD) as loading:
                pin(loading.pid, price.LOAD_CORE)
                try:
                    said = json.loads(loading.communicate(timeout=ANSWER_SECONDS)[0])
                finally:
                    loading.kill()
            if said["failed"]:
                raise LocalError(f"expected every call to be answered rightly, found {said}")
            used = processes[variant].cpu_times()
            return float(said["calls"] / (used.user + used.system - before.user - before.system))

        found = price.alternate(measure, rounds, "hello", list(processes))
    if "hello.HelloWorld code=OK" not in full.log.read_text():
        raise LocalError(f"expected a log line per call in {full.log}, found none: this would compare the wrong thing")
    full.kill()
    return found
