"""Calls sum's Add in three ways at the same time, from inside the cluster: `python -m bench`.

16 callers for each way. Each second a line of JSON tells what was seen of each way since the beginning, and for how
many seconds at most the process itself was held up, by a machine that has too much to do.
"""

import asyncio
import json
import math
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc

WAYS = ("rollcall", "clusterip", "headless")
CALLERS = 16  # of each way
PAUSE = 0.2  # seconds between two calls of one caller: the cores are for those that are called
REPORT = 1.0  # seconds between two lines
DEADLINE = 5.0  # seconds; what `dial` gives by default, so that the others have it as well
ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
WIDTH = 1.05
"""A bucket of latencies ends at so many times its begin."""


@dataclass
class Tally:
    """What was seen of one way."""

    answered: Counter[str] = field(default_factory=Counter)
    """Calls by the instance that has answered."""
    failed: Counter[str] = field(default_factory=Counter)
    """Calls by the status they have failed with."""
    said: dict[str, str] = field(default_factory=dict)
    """What the last call that has failed with a status has said."""
    bad_seconds: int = 0
    """Seconds by the clock in which a call has failed."""
    last_bad: int = 0
    first: dict[str, float] = field(default_factory=dict)
    """When each instance has answered for the first time, in seconds since 1970."""
    latencies: Counter[str] = field(default_factory=Counter)
    """Answered calls by bucket; a string, as JSON's keys are."""

    async def count(self, add: Any) -> None:
        """Make a call and count it."""
        begun = time.monotonic()
        call = add(sum_pb2.AddRequest(num1=333, num2=666), timeout=DEADLINE)
        try:
            if (found := (await call).res) != 999:
                self._fail("wrong answer", f"expected 999, found {found}")
                return
            instance = str(dict(await call.trailing_metadata())["rollcall-instance"])
        except grpc.aio.AioRpcError as error:
            self._fail(error.code().name, (error.details() or "")[:200])
            return
        self.answered[instance] += 1
        self.first.setdefault(instance, round(time.time(), 2))
        self.latencies[f"{math.log(time.monotonic() - begun, WIDTH):.0f}"] += 1

    def _fail(self, status: str, said: str) -> None:
        self.failed[status] += 1
        self.said[status] = said
        self.bad_seconds += self.last_bad != (now := int(time.time()))
        self.last_bad = now

    @classmethod
    def read(cls, report: Any) -> Self:
        """Return what a line has told of a way."""
        counters = {name: Counter(report[name]) for name in ("answered", "failed", "latencies")}
        return cls(**{**report, **counters})

    @property
    def calls(self) -> int:
        return self.answered.total() + self.failed.total()

    def since(self, before: "Tally") -> "Tally":
        return Tally(
            self.answered - before.answered,
            self.failed - before.failed,
            self.said,
            self.bad_seconds - before.bad_seconds,
            self.last_bad,
            {instance: when for instance, when in self.first.items() if instance not in before.first},
            self.latencies - before.latencies,
        )

    def percentile(self, share: float) -> float:
        """Return the latency, in seconds, that this share of the answered calls did not exceed; to about 2.5 %."""
        rank = math.ceil(share * self.latencies.total())
        for bucket in sorted(self.latencies, key=int):
            rank -= self.latencies[bucket]
            if rank <= 0:
                return float(WIDTH ** int(bucket))
        return math.nan


def channels() -> dict[str, grpc.aio.Channel]:
    """Return a channel for each way; those without Rollcall are as gRPC makes them: no retries, no waiting."""
    headless = (("grpc.service_config", ROUND_ROBIN),)
    return {
        "rollcall": rollcall.dial("sum"),
        "clusterip": grpc.aio.insecure_channel("dns:///sum-clusterip:8080"),
        "headless": grpc.aio.insecure_channel("dns:///rollcall-sum-headless:8080", options=headless),
    }


async def main() -> None:
    """Call until killed."""
    tallies = {way: Tally() for way in WAYS}
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:

        async def caller(tally: Tally, add: Any, offset: float) -> None:
            await asyncio.sleep(offset)
            while True:
                await tally.count(add)
                await asyncio.sleep(PAUSE)

        for number, (way, channel) in enumerate(channels().items()):
            stub = sum_pb2_grpc.SumServiceStub(await stack.enter_async_context(channel))
            for turn in range(CALLERS):
                # Evenly over the pause: callers that call at once would wait for each other.
                offset = PAUSE * (turn * len(WAYS) + number) / (CALLERS * len(WAYS))
                group.create_task(caller(tallies[way], stub.Add, offset))
        held_up = 0.0
        while True:
            due = time.monotonic() + REPORT
            await asyncio.sleep(REPORT)
            held_up = max(held_up, time.monotonic() - due)
            ways = {way: vars(tally) for way, tally in tallies.items()}
            print(json.dumps({"held_up": round(held_up, 2), "ways": ways}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
