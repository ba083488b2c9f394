"""What runs now, for the page: all services and their instances as the registry has them, and how they are doing.

Rates come from the instances' own /metrics, once a second and only while somebody looks; all who look share one round
of asking.
"""

import asyncio
import contextlib
import itertools
import logging
import re
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rollcall.registry import Instance, Registry, target
from services.gateway.follow import follow

log = logging.getLogger(__name__)

CONSUL = "consul"
"""Consul's servers, which all register by one id: Consul's own page is where to see them."""

PERIOD = 1.0  # seconds from one round of asking to the next
ANSWER = 1.0  # seconds that an instance has to tell its metrics
AT_ONCE = 8  # instances that are asked at the same time
MOST = 1_048_576  # bytes of metrics that are read from one instance
WINDOW = 10  # rounds that latencies are taken from
FIRST_LOOK = 2.0  # seconds that the registry has to tell of every service before what is known by then is shown
LINGER = 5.0  # seconds for which all is followed on when nobody looks: whoever loads the page again will
MISSED = 3  # rounds without an answer after which nothing is known of an instance any more
BEAT = 5.0  # seconds after which a viewer is sent the same again, so that each side notices when the other has gone

# What counts, of an instance's metrics; not the counters that stand at 0, which most do.
# https://prometheus.io/docs/instrumenting/exposition_formats/
_COUNTED = re.compile(
    r"^(grpc|jsonrpc|http)_server_(in_flight|handling_seconds_bucket|(?:handled|msg_\w+)_total(?!.* 0\.0$))"
    r"\{(.*)\} (\S+)$",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_FINE = re.compile(r"OK|CANCELLED|499|4001|[123]..")
"""The codes of calls that are no errors: those that ended well, and those that their callers gave up."""


class Live:
    """Follows the registry and the instances while there is a viewer."""

    def __init__(
        self, registry: Registry, consul: str = "", *, service: str = "gateway", public_tag: str = "public"
    ) -> None:
        """`consul` is its web page; `service` the gateway's own name, which calls every service with the public tag."""
        self._registry, self._service, self._tag, self._consul = registry, service, public_tag, consul
        self._viewers = 0
        self._following: asyncio.Task[None] | None = None
        self._view: _View | None = None

    async def snapshots(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield what runs now, then each change of it, and at least every few seconds.

        Use `contextlib.aclosing`: soon after the last viewer has gone, all following ends. Raises what ended it before.
        """
        self._viewers += 1
        if self._view is None or self._following is None or self._following.done():
            self._view = _View()
            self._following = asyncio.create_task(self._follow(self._view))
        following, view = self._following, self._view
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK):
                    await view.whole.wait()
            told, again = None, 0.0
            while not following.done():
                change, now = view.change, self._snapshot(view)
                if now != told or time.monotonic() >= again:
                    told, again = now, time.monotonic() + BEAT
                    yield now
                await asyncio.wait([change, following], timeout=BEAT, return_when=asyncio.FIRST_COMPLETED)
            following.result()
        finally:
            self._viewers -= 1
            asyncio.get_running_loop().call_later(LINGER, self._end, following)

    def _end(self, following: asyncio.Task[None]) -> None:
        if not self._viewers and self._following is following:
            self._following = None
            following.cancel()

    async def _follow(self, view: "_View") -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_all(view))
            followers: dict[str, asyncio.Task[None]] = {}
            async with aclosing(follow(self._registry.watch_services())) as changes:
                async for names in changes:
                    view.names = set(names) - {CONSUL}
                    for name in followers.keys() - view.names:
                        followers.pop(name).cancel()
                        view.services.pop(name, None)
                    for name in view.names - followers.keys():
                        followers[name] = group.create_task(self._follow_service(name, view))
                    view.changed()

    async def _follow_service(self, name: str, view: "_View") -> None:
        async with aclosing(follow(self._registry.watch(name, failing=True))) as changes:
            async for instances in changes:
                if view.names and name in view.names:
                    view.services[name] = instances
                    view.changed()

    async def _ask_all(self, view: "_View") -> None:
        """Ask each instance that passes for its metrics, again and again."""
        free = asyncio.Semaphore(AT_ONCE)
        await view.whole.wait()
        while True:
            next_round = time.monotonic() + PERIOD
            present = {_key(each): each for each in itertools.chain(*view.services.values()) if each.passing}
            for gone in view.figures.keys() - present.keys():
                del view.figures[gone]
            async with asyncio.TaskGroup() as group:
                for key, instance in present.items():
                    group.create_task(_ask(free, instance, view.figures.setdefault(key, Figures())))
            view.changed()
            await asyncio.sleep(next_round - time.monotonic())

    def _snapshot(self, view: "_View") -> dict[str, Any]:
        services = view.services
        public = {name for name, instances in services.items() if any(self._tag in each.tags for each in instances)}
        return {
            "services": [
                {
                    "name": name,
                    "protocol": next((each.meta["protocol"] for each in instances if "protocol" in each.meta), ""),
                    "public": name in public,
                    "calls": sorted(
                        {called for each in instances for called in each.meta.get("calls", "").split(",") if called}
                        | (public - {name} if name == self._service else set())
                    ),
                    "instances": [
                        {
                            "id": each.id,
                            "address": each.target,
                            "passing": each.passing,
                            "version": each.version,
                            **view.figures.get(_key(each), NOTHING).told(),
                        }
                        for each in instances
                    ],
                }
                for name, instances in sorted(services.items())
            ],
            "consul": self._consul,
        }


class _View:
    """What all viewers see, kept by one task."""

    def __init__(self) -> None:
        self.names: set[str] | None = None
        self.services: dict[str, tuple[Instance, ...]] = {}
        self.figures: dict[tuple[str, str], Figures] = {}
        self.whole = asyncio.Event()
        """Set once every service that was registered at the beginning is known."""
        self.change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the next change."""

    def changed(self) -> None:
        if self.names is not None and self.services.keys() >= self.names:
            self.whole.set()
        self.change.set_result(None)
        self.change = asyncio.get_running_loop().create_future()


@dataclass(frozen=True, slots=True)
class Sample:
    """What an instance has counted since it began."""

    at: float
    """By `time.monotonic`."""
    calls: float = 0.0
    errors: float = 0.0
    in_flight: float = 0.0
    buckets: Mapping[float, float] = field(default_factory=dict)
    """How many calls with one answer took no longer than so many seconds."""


class Figures:
    """The last samples of one instance, and what follows from them."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=WINDOW + 1)
        self._missed = 0

    def add(self, sample: Sample) -> None:
        """Take one more. An instance that has begun again counts from nothing."""
        if self._samples and sample.calls < self._samples[-1].calls:
            self._samples.clear()
        self._samples.append(sample)
        self._missed = 0

    def miss(self) -> None:
        """Take note that there was none."""
        self._missed += 1
        if self._missed >= MISSED:
            self._samples.clear()

    def told(self) -> dict[str, Any]:
        """Return rates per second, latencies in seconds and calls in flight; None for what is not known."""
        found: dict[str, Any] = dict.fromkeys(("rate", "errors", "p50", "p95", "in_flight"))
        if self._samples:
            newest = self._samples[-1]
            found["in_flight"] = int(newest.in_flight)
        if len(self._samples) > 1:
            before, oldest = self._samples[-2], self._samples[0]
            seconds = newest.at - before.at
            found["rate"] = round((newest.calls - before.calls) / seconds, 1)
            found["errors"] = round((newest.errors - before.errors) / seconds, 1)
            grown = {bound: max(0.0, count - oldest.buckets.get(bound, 0)) for bound, count in newest.buckets.items()}
            found["p50"], found["p95"] = quantile(grown, 0.5), quantile(grown, 0.95)
        return found


NOTHING = Figures()


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Return the seconds that this share of calls took at most, as Prometheus estimates them from a histogram.

    `buckets` has how many took no longer than each bound. None when there were no calls.
    """
    below_bound = below = 0.0
    total = max(buckets.values(), default=0.0)
    if not total:
        return None
    for bound, count in sorted(buckets.items()):
        if count >= share * total:
            if bound == float("inf"):
                return below_bound
            return round(below_bound + (bound - below_bound) * (share * total - below) / (count - below), 6)
        below_bound, below = bound, count
    return below_bound


def parse(metrics: str, at: float) -> Sample:
    """Return what an instance's metrics say of its calls, in Prometheus' text format.

    Raises ValueError for what is not in that format.
    """
    calls = errors = in_flight = 0.0
    buckets: defaultdict[frozenset[tuple[str, str]], dict[float, float]] = defaultdict(dict)
    streams = set()
    for protocol, what, text, figure in _COUNTED.findall(metrics):
        labels, value = dict(_LABEL.findall(text)), float(figure)
        match what:
            case "handled_total":
                calls += value
                if not _FINE.fullmatch(labels.get(f"{protocol}_code", "")):
                    errors += value
            case "in_flight":
                in_flight += value
            case "handling_seconds_bucket":
                bound = float(labels.pop("le", "inf"))
                buckets[frozenset(labels.items())][bound] = value
            case _:  # messages, which only streams count
                streams.add(frozenset(labels.items()))
    total: defaultdict[float, float] = defaultdict(float)
    for method in buckets.keys() - streams:  # how long a stream was open says nothing of how fast it is answered
        for bound, count in buckets[method].items():
            total[bound] += count
    return Sample(at, calls, errors, in_flight, total)


async def _ask(free: asyncio.Semaphore, instance: Instance, figures: Figures) -> None:
    """Add a sample of an instance, or that there was none: one that is not ours does not tell."""
    port = instance.meta.get("http_port", "")
    if not (port.isascii() and port.isdigit()):
        return
    async with free:
        try:
            async with asyncio.timeout(ANSWER):
                metrics = await _metrics(instance.address, int(port))
            figures.add(parse(metrics, time.monotonic()))
        except (OSError, TimeoutError, ValueError, OverflowError) as error:
            log.debug("%s does not tell its metrics: %r", instance.id, error)
            figures.miss()


async def _metrics(address: str, port: int) -> str:
    """Get an instance's metrics, by HTTP/1.0, as its probes speak it.

    A client library takes five times the CPU for it, of the process that answers calls.
    """
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {target(address, port)}\r\n\r\n".encode())
        answer = bytearray()
        while chunk := await reader.read(MOST):
            answer += chunk
            if len(answer) > MOST:
                raise ValueError(f"expected at most {MOST} bytes of metrics, found more")
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if not re.match(rb"HTTP/1\.[01] 200\b", head):
        raise ValueError(f"expected status 200, found {bytes(head[:40])!r}")
    return body.decode()


def _key(instance: Instance) -> tuple[str, str]:
    return instance.id, instance.target
