"""The gateway beside a FastAPI handler written by hand: calls per CPU second of each."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import requests

from bench import price
from bench.rig import START_SECONDS, pin
from deploy.local import LocalError

if TYPE_CHECKING:
    from bench.rig import Rig


def gateway(rig: Rig, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Load both in turns by the same client; what both call is one bare server."""
    called = rig.child("called-by-http", "services.sum", "--id", "sum-called", "--tags", "public")
    called.logged(lambda text: "is registered" in text, "registered")
    bare = rig.child("handwritten", "bench.handwritten", f"127.0.0.1:{price.port_of(called)}")
    (full,) = rig.instances(["gateway-full"])
    ports = {"handwritten": bare.read(), "rollcall": price.port_of(full)}
    _await_method(ports["rollcall"])
    children = {"handwritten": bare, "rollcall": full}
    loads = {
        variant: rig.child(f"{variant}-requester", "bench.requester", f"{port}") for variant, port in ports.items()
    }
    for child in children.values():
        pin(child, price.SERVER_CORE)
    for other in (*loads.values(), called):
        pin(other, price.LOAD_CORE)

    def measure(variant: str) -> float:
        before = children[variant].cpu()
        calls = loads[variant].ask(seconds)
        if not calls:
            raise LocalError(f"expected {variant} to answer 999, found other answers, or none")
        return float(calls / (children[variant].cpu() - before))

    found = price.alternate(measure, rounds, "gateway", list(children))
    for child, line in ((bare, '"POST /v1/sum/Add HTTP/1.1" 200'), (full, r"/v1/sum/Add code=200")):
        if not re.search(line, child.log.read_text()):
            raise LocalError(
                f"expected a log line per call in {child.log}, found none: this would compare the wrong thing"
            )
    for child in (*children.values(), *loads.values(), called):
        child.kill()
    return found


def _await_method(port: int) -> None:
    """Wait until the gateway knows sum's methods."""
    deadline = time.monotonic() + START_SECONDS
    url = f"http://127.0.0.1:{port}/v1/sum/Add"
    while not (answer := requests.post(url, json={}, timeout=START_SECONDS)).ok:
        if time.monotonic() > deadline:
            raise LocalError(f"expected {url} to answer, found {answer.status_code} {answer.text}")
        time.sleep(0.05)
