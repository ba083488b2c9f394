"""What can be called: the public services that are registered, and what each has said of its methods.

A service describes itself, by gRPC reflection or by JSON-RPC's `rpc.discover`. It is asked when it appears, and again
when an instance has come that may be of another version: so the gateway needs neither a change nor a restart to call
what is new.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Self

import rollcall
from rollcall import jsonrpc
from rollcall.reflection import Described, ReflectionError, reflect
from rollcall.registry import Instance, Registry, RegistryError
from services.gateway.follow import follow
from services.gateway.methods import GrpcMethod, JsonRpcMethod, Method
from services.gateway.schema import Schemas
from services.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

ASK = 5.0  # seconds that an instance has to describe itself
ASK_AGAIN = 1.0  # seconds until an instance that did not is asked again
KEPT = 15.0  # seconds for which a service that is not registered any more stays: more likely Consul is at fault
LOOK = 1.0  # seconds between two questions to it whether that is certain
FIRST_LOOK = 3.0  # seconds that a gateway which starts has to learn what is there, before it is registered itself


class Service:
    """A public service, as far as it is known."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.methods: Mapping[str, Method] = {}
        """By each of the names that they can be called by."""
        self.components: Mapping[str, Any] = {}
        """The schemas that its methods' schemas refer to."""
        self.problem = "it has not been asked yet"
        """Why its methods are not known, while they are not."""
        self.settled = asyncio.Event()
        """Set once it has been asked, with or without success."""


class Catalog:
    """The public services. `version` is another one each time what they can be called by has changed."""

    def __init__(self, registry: Registry, settings: GatewaySettings) -> None:
        self.services: dict[str, Service] = {}
        self.version = 0
        self._registry, self._settings = registry, settings
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._named = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def open(cls, registry: Registry, settings: GatewaySettings) -> AsyncIterator[Self]:
        """Follow the registry from now on. Yields when all that is there is known, or has had the time to be."""
        catalog = cls(registry, settings)
        following = asyncio.create_task(catalog._follow())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LOOK):
                    await catalog._named.wait()
                    for service in list(catalog.services.values()):
                        await service.settled.wait()
            yield catalog
        finally:
            tasks = [following, *catalog._followers.values(), *catalog._leaving]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _follow(self) -> None:
        """Keep a follower for each name that is registered."""
        dropping: dict[str, asyncio.Task[None]] = {}
        watch = self._registry.watch_services(self._settings.public_tag)
        async with asyncio.TaskGroup() as group, aclosing(follow(watch)) as changes:
            async for names in changes:
                for name in names:
                    if name in dropping:
                        dropping.pop(name).cancel()
                    if name not in self._followers:
                        service = self.services[name] = Service(name)
                        self._followers[name] = asyncio.create_task(self._follow_service(service))
                for name in self._followers.keys() - set(names) - dropping.keys():
                    dropping[name] = group.create_task(self._drop(name, dropping))
                self._named.set()

    async def _drop(self, name: str, dropping: dict[str, asyncio.Task[None]]) -> None:
        """Forget a service, once the registry has been certain for a while that it is gone."""
        missed = 0.0
        while missed < KEPT:
            await asyncio.sleep(LOOK)
            missed = missed + LOOK if await asyncio.to_thread(self._gone, name) else 0.0
        del dropping[name], self.services[name]
        self.version += 1
        # Calls may be in flight still, to instances that drain: their channel goes with the follower.
        follower = self._followers.pop(name)
        self._leaving.add(follower)
        follower.add_done_callback(self._leaving.discard)
        asyncio.get_running_loop().call_later(self._settings.longest, follower.cancel)

    def _gone(self, name: str) -> bool:
        try:
            return not self._registry.instances(name, self._settings.public_tag, failing=True, certain=True)
        except RegistryError:
            return False

    async def _follow_service(self, service: Service) -> None:
        """Have a service describe itself, and again when somebody new has come or the one who did has gone."""
        watch = self._registry.watch(service.name, self._settings.public_tag)
        async with aclosing(follow(watch)) as changes, AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            speaker = _Speaker(service, self._registry, self._settings, stack, group)
            asking: asyncio.Task[None] | None = None
            async for instances in changes:
                if asking:
                    asking.cancel()
                asking = group.create_task(self._ask(speaker, instances))

    async def _ask(self, speaker: "_Speaker", instances: tuple[Instance, ...]) -> None:
        """Ask one instance after the other, until one has described the service."""
        while wanted := speaker.wanted(instances):
            for instance in wanted:
                try:
                    changed = await speaker.ask(instance)
                except (ReflectionError, jsonrpc.JsonRpcError) as error:
                    speaker.failed(instance, str(error))
                except Exception as error:  # whatever it is, what is known of the service must go on being renewed
                    log.exception("what %s says of itself could not be taken over", instance.id)
                    speaker.failed(instance, repr(error))
                else:
                    speaker.known = {(each.id, each.target) for each in instances}
                    self.version += changed
                    return
            await asyncio.sleep(ASK_AGAIN)


class _Speaker:
    """Learns from its instances what a service can be asked, and makes the methods to do so."""

    def __init__(
        self,
        service: Service,
        registry: Registry,
        settings: GatewaySettings,
        stack: AsyncExitStack,
        group: asyncio.TaskGroup,
    ) -> None:
        self._service, self._registry, self._settings = service, registry, settings
        self._stack, self._group = stack, group
        self.known: set[tuple[str, str]] = set()
        """The instances that were there when one of them was last asked with success."""
        self._source = ("", "")
        self._said: Any = None
        self._channel: rollcall.Channel | None = None
        self._client: AsyncExitStack | None = None

    def wanted(self, instances: tuple[Instance, ...]) -> list[Instance]:
        """Return the instances of which one should be asked now: the new ones; or all, when he who was has gone."""
        new = [each for each in instances if (each.id, each.target) not in self.known]
        gone = all((each.id, each.target) != self._source for each in instances)
        return new or (list(instances) if gone else [])

    async def ask(self, instance: Instance) -> bool:
        """Have an instance describe the service; return whether that is another description than before.

        Raises `ReflectionError` or `JsonRpcError` when it does not.
        """
        said: Described | list[jsonrpc.Described]
        if instance.meta.get("protocol") == "jsonrpc":
            said = await jsonrpc.discover(instance.target, deadline=ASK)
        else:
            said = await reflect(instance.target, timeout=ASK)
        changed = bool(said != self._said)
        if changed:
            await (self._take_grpc(said) if isinstance(said, Described) else self._take_jsonrpc(said))
        self._said, self._source = said, (instance.id, instance.target)
        self._service.problem = ""
        self._service.settled.set()
        return changed

    def failed(self, instance: Instance, problem: str) -> None:
        """Note why an instance did not describe the service."""
        problem = f"{instance.id} at {instance.target} does not tell its methods: {problem}"
        if problem != self._service.problem:
            log.warning("%s: %s", self._service.name, problem)
        self._service.problem = problem
        self._service.settled.set()

    async def _take_grpc(self, said: Described) -> None:
        name, tag = self._service.name, self._settings.public_tag
        if self._channel is None:
            channel = rollcall.dial(name, tag=tag, registry=self._registry)
            self._channel = await self._stack.enter_async_context(channel)
        schemas = Schemas(said.types)
        names = _names((each.name, each.full_name) for each in said.methods)
        made = [GrpcMethod(name, names[each.full_name], each, schemas, self._channel) for each in said.methods]
        self._service.methods = _by_each_name(made)
        self._service.components = schemas.components

    async def _take_jsonrpc(self, said: list[jsonrpc.Described]) -> None:
        name, tag = self._service.name, self._settings.public_tag
        contract = jsonrpc.Contract.described(name, said)
        dialled = jsonrpc.dial(contract, name=name, tag=tag, registry=self._registry, deadline=self._settings.longest)
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(dialled)
            names = _names((each.name, f"{each.service}.{each.name}") for each in said)
            made = [JsonRpcMethod(name, names[f"{each.service}.{each.name}"], each, client) for each in said]
            opened = stack.pop_all()
        self._stack.push_async_exit(opened)
        if self._client:
            self._group.create_task(_close_later(self._client, self._settings.longest))
        self._service.methods, self._service.components, self._client = _by_each_name(made), {}, opened


def _names(both: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return by full name what each method is called by: its own name alone, where no other has it."""
    pairs = list(both)
    namesakes = Counter(own for own, _ in pairs)
    return {full: own if namesakes[own] == 1 else full for own, full in pairs}


def _by_each_name(methods: Iterable[Method]) -> dict[str, Method]:
    found: dict[str, Method] = {}
    for method in methods:
        found |= {method.operation.method: method, method.full_name: method}
    return found


async def _close_later(stack: AsyncExitStack, seconds: float) -> None:
    """Close what calls may still use that have begun."""
    await asyncio.sleep(seconds)
    await stack.aclose()
