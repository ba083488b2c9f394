"""Calls every service through `dial`, all the while, from inside the cluster: `python -m caller`.

16 callers take turns at all services. Each second a line of JSON tells how many calls were answered, by whom, and how
many failed, all since the beginning.
"""

import asyncio
import json
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from contracts.hello.v1.hello import HELLO
from contracts.person.v1 import person_pb2, person_pb2_grpc
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall import jsonrpc

CALLERS = 16
PACE = 0.1  # seconds between two calls of one caller: the cores are for those that are called
REPORT = 1.0  # seconds between two lines
DEADLINE = 20.0  # seconds: what is tested is that calls are answered, on a machine that does much else meanwhile
AGAIN = 5  # attempts, of a call that may be made again by hand
AGAIN_AT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # the latter of one that stops just then

Call = Callable[[], Awaitable[str]]
"""Makes a call, sees that its answer is right, and returns the id of the instance that has given it."""


async def answered_by(call: Any) -> str:
    """Return the id of the instance that has answered a gRPC call."""
    return str(dict(await call.trailing_metadata())["rollcall-instance"])


def expect(what: object, found: object) -> None:
    """Raise ValueError unless the answer is right."""
    if found != what:
        raise ValueError(f"expected {what}, found {found}")


async def calls(stack: AsyncExitStack) -> dict[str, Call]:
    """Return a call of each service."""

    async def dial(name: str) -> rollcall.Channel:
        return await stack.enter_async_context(rollcall.dial(name, deadline=DEADLINE))

    sums = sum_pb2_grpc.SumServiceStub(await dial("sum"))
    people = person_pb2_grpc.PersonServiceStub(await dial("person"))
    greeters = greeter_pb2_grpc.GreeterServiceStub(await dial("greeter"))
    students = student_pb2_grpc.StudentServiceStub(await dial("student"))
    hello = await stack.enter_async_context(jsonrpc.dial(HELLO, deadline=DEADLINE))

    async def add() -> str:
        call = sums.Add(sum_pb2.AddRequest(num1=333, num2=666))
        expect(999, (await call).res)
        return await answered_by(call)

    async def do() -> str:
        call = people.Do(person_pb2.Person(name="李白", age=333))
        expect(999, (await call).age)
        return await answered_by(call)

    async def greet() -> str:
        call = greeters.Call(greeter_pb2.CallRequest(name="李白"))
        expect("Hello 李白", (await call).msg)
        return await answered_by(call)

    async def hello_world() -> str:
        expect("李白 你好", await hello.HelloWorld("李白"))
        return jsonrpc.answered_by.get()

    async def store() -> str:
        # Not idempotent by its contract, unless it brings a key: then it may be made again.
        metadata = (("idempotency-key", uuid.uuid4().hex),)
        attempts = AGAIN
        while True:
            attempts -= 1
            call = students.AddFunc(student_pb2.Student(name="李白", score=[90, 85, 77]), metadata=metadata)
            try:
                expect(252, (await call).total)
                return await answered_by(call)
            except grpc.aio.AioRpcError as error:
                if error.code() not in AGAIN_AT or not attempts:
                    raise

    return {"sum": add, "person": do, "greeter": greet, "hello": hello_world, "student": store}


class Tally:
    """What was seen so far."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.slowest: dict[str, float] = {}
        self.errors: deque[str] = deque(maxlen=20)

    async def count(self, service: str, call: Call) -> None:
        """Make a call and count it."""
        begun = time.monotonic()
        try:
            self.answered[await call()] += 1
        except (grpc.aio.AioRpcError, jsonrpc.JsonRpcError, ValueError) as error:
            self.failed[service] += 1
            said = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
            self.errors.append(f"{time.strftime('%T')} {service}: {said}")
        self.calls[service] += 1
        self.slowest[service] = max(self.slowest.get(service, 0.0), round(time.monotonic() - begun, 3))


async def main() -> None:
    """Call until killed, or until there is a failure to prepare."""
    wanted = sys.argv[1:]
    tally = Tally()
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        all_calls = [(name, call) for name, call in (await calls(stack)).items() if not wanted or name in wanted]

        async def caller(turn: int) -> None:
            while True:
                await tally.count(*all_calls[turn % len(all_calls)])
                turn += 1
                await asyncio.sleep(PACE)

        for turn in range(CALLERS):
            group.create_task(caller(turn))
        while True:
            await asyncio.sleep(REPORT)
            report = {key: list(value) if key == "errors" else value for key, value in vars(tally).items()}
            print(json.dumps(report, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
