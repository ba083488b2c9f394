"""How soon callers hear of an instance that comes or goes, what one weighs, and what watching many costs."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc.aio
import requests

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from deploy.local import LocalError
from deploy.local.progress import say
from rollcall.instrument import INSTANCE

if TYPE_CHECKING:
    from bench.rig import Child, Rig

CALLERS = 4
PAUSE = 0.0005  # seconds between a caller's calls, which bounds how finely times can be told
SETTLE_SECONDS = 1.5
WAIT_SECONDS = 20.0
FAKE = "fake"


def comings_and_goings(rig: Rig, rounds: int) -> dict[str, float]:
    """Start and kill one of three instances under calls.

    The first call is the first that the new instance has answered, taken at its begin, and counted from the time its
    log says that it was registered. The last call is the last that failed because it had been sent to the dead
    instance, taken at its begin, and counted from just before the kill; 0 when only calls already under way were hit.
    For this the callers' retries are off: else another instance would answer, and nobody would know.
    """
    return asyncio.run(_comings_and_goings(rig, rounds))


async def _comings_and_goings(rig: Rig, rounds: int) -> dict[str, float]:
    first_calls, last_calls, failed = list[float](), list[float](), 0
    survivors = rig.instances(["sum-stays-1", "sum-stays-2"])
    seen: dict[str, float] = {}  # instance: when the first call that it answered began
    failures: list[float] = []  # when each failed call began
    registry = rollcall.ConsulRegistry(rig.cluster.addresses)
    async with rollcall.dial("sum", registry=registry, retries=0) as channel:
        stub = sum_pb2_grpc.SumServiceStub(channel)

        async def call_for_ever() -> None:
            while True:
                begun = time.time()
                call = stub.Add(sum_pb2.AddRequest(num1=333, num2=666))
                try:
                    await call
                except grpc.aio.AioRpcError:
                    failures.append(begun)
                else:
                    answered_by = next(value for key, value in await call.trailing_metadata() if key == INSTANCE)
                    seen.setdefault(str(answered_by), begun)
                await asyncio.sleep(PAUSE)

        callers = [asyncio.create_task(call_for_ever()) for _ in range(CALLERS)]
        try:
            for number in range(rounds):
                name = f"sum-comes-{number}"
                (instance,) = await asyncio.to_thread(rig.instances, [name])
                registered = _when_registered(instance)
                deadline = time.monotonic() + WAIT_SECONDS
                while name not in seen:
                    if time.monotonic() > deadline:
                        raise LocalError(f"expected a call to {name} within {WAIT_SECONDS:g} s, found none")
                    await asyncio.sleep(0.005)
                first_calls.append(max(0.0, seen[name] - registered))
                await asyncio.sleep(SETTLE_SECONDS)
                failures.clear()
                killed = time.time()
                instance.kill()
                await asyncio.sleep(SETTLE_SECONDS)
                last_calls.append(max(0.0, *(begun - killed for begun in failures), 0.0))
                failed += len(failures)
                say(f"  came and went: {number + 1} of {rounds}")
        finally:
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
    for survivor in survivors:
        survivor.kill()
    return {
        "registered_to_first_call_seconds": statistics.median(first_calls),
        "registered_to_first_call_seconds_worst": max(first_calls),
        "kill_to_last_call_seconds": statistics.median(last_calls),
        "kill_to_last_call_seconds_worst": max(last_calls),
        "calls_lost_per_kill_without_retries": failed / rounds,
    }


def at_rest(rig: Rig, seconds: float) -> dict[str, float]:
    """Leave three instances alone, but for Consul's checks each second."""
    instances = rig.instances(["sum-idle-1", "sum-idle-2", "sum-idle-3"])
    time.sleep(1)
    before = [instance.cpu() for instance in instances]
    time.sleep(seconds)
    used = [instance.cpu() - begun for instance, begun in zip(instances, before, strict=True)]
    memory = [instance.process.memory_info().rss for instance in instances]
    for instance in instances:
        instance.kill()
    return {
        "idle_cpu_percent": 100 * statistics.mean(used) / seconds,
        "resident_bytes": statistics.mean(memory),
    }


def watching(rig: Rig, sizes: tuple[int, ...], changes: int) -> list[dict[str, float]]:
    """Register more and more instances that do not exist, without checks, and change one of them again and again.

    Time runs from just before the change is sent to Consul to the snapshot being ready for gRPC.
    """
    rows, registered = list[dict[str, float]](), 0
    session = requests.Session()
    session.trust_env = False
    base = f"http://{rig.cluster.addresses[0]}/v1"

    def register(number: int, generation: int = 0) -> None:
        address = {"Address": f"127.1.{number // 250}.{number % 250 + 1}", "Port": 9}
        meta = {"version": f"1.0.{generation}"}
        body = {"ID": f"{FAKE}-{number:04}", "Name": FAKE, **address, "Meta": meta, "Tags": ["blue"]}
        session.put(f"{base}/agent/service/register", json=body, timeout=10).raise_for_status()

    for size in sizes:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(register, range(registered, size)))
        registered = size
        _wait_listed(session, base, size)
        watcher = rig.child(f"watcher-{size}", "bench.watcher", FAKE, "10000")
        line = watcher.read()
        times, cpu = list[float](), line["cpu"]
        for change in range(1, changes + 1):
            begun = time.time()
            register(size // 2, change)
            line = watcher.read()
            times.append(line["when"] - begun)
        answer = session.get(f"{base}/health/service/{FAKE}?passing", timeout=10)
        rows.append(
            {
                "instances": size,
                "cpu_seconds_per_change": (line["cpu"] - cpu) / changes,
                "change_to_snapshot_seconds": statistics.median(times),
                "consul_answer_bytes": len(answer.content),
                "told_to_grpc_bytes": line["bytes"],
                "resident_bytes": watcher.process.memory_info().rss,
            }
        )
        watcher.kill()
        say(f"  watched {size} instances")
    return rows


def _wait_listed(session: requests.Session, base: str, size: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    found: Any = []
    while len(found) != size:
        if time.monotonic() > deadline:
            raise LocalError(f"expected Consul to list {size} instances of {FAKE}, found {len(found)}")
        time.sleep(0.1)
        found = json.loads(session.get(f"{base}/health/service/{FAKE}?passing", timeout=10).content)


def _when_registered(instance: Child) -> float:
    """Return the time that the instance's log gives to its registration, in seconds since 1970."""
    line = re.search(r"^(\S+Z) INFO .* is registered", instance.log.read_text(), re.MULTILINE)
    if not line:
        raise LocalError(f"expected {instance.log} to tell when {instance.name} was registered; it does not")
    return datetime.strptime(line[1], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
