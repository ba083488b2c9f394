"""student, over the wire, with its store on each database and a real sum."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, cast

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

import rollcall
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.student.v1.student_pb2 import GetRequest, ListRequest, Student
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from rollcall.instrument import Instrumented
from rollcall.telemetry import Telemetry
from services.student.handler import IN_FLIGHT, _after, _token
from services.student.handler import Student as Handler
from services.student.store import Store
from services.sum.handler import Sum
from tests.postgres import PostgreSQL


class CountingSum(Sum):
    """sum, as it is, and how it was called."""

    def __init__(self) -> None:
        self.calls = 0
        self.in_flight = 0
        self.idle = asyncio.Event()
        """Set when the last call in flight has ended."""
        self.refuses = range(0)
        """Which calls it refuses, by their number."""
        self.gathers = 0
        """How many calls must have come before the first is answered."""
        self.gathered = asyncio.Event()

    async def Add(self, request: sum_pb2.AddRequest, context: Any) -> sum_pb2.AddResponse:
        self.calls += 1
        self.in_flight += 1
        try:
            if self.calls in self.refuses:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "sum has had enough")
            if self.calls >= self.gathers:
                self.gathered.set()
            await self.gathered.wait()
            return await super().Add(request, context)
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()


def over_the_wire(database: str, scenario: Callable[[Any, CountingSum], Awaitable[None]]) -> None:
    async def serve(stack: AsyncExitStack, add_to_server: Callable[[Any, Any], None], servicer: Any) -> int:
        server = grpc.aio.server()
        measured = Instrumented(server, Telemetry("", "", ""))
        add_to_server(servicer, measured)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        stack.push_async_callback(server.stop, None)
        return port

    async def run() -> None:
        sums = CountingSum()
        async with asyncio.timeout(30), Store(database) as store, AsyncExitStack() as stack:
            registry = rollcall.MemoryRegistry()
            port = await serve(stack, sum_pb2_grpc.add_SumServiceServicer_to_server, sums)
            registry.register(rollcall.Instance("sum-1", "sum", "127.0.0.1", port), rollcall.TtlCheck(3))
            adding = await stack.enter_async_context(
                rollcall.dial("sum", registry=registry, max_requests=IN_FLIGHT)  # its circuit breaker refuses the rest
            )
            student = Handler(store, sum_pb2_grpc.SumServiceStub(adding))
            port = await serve(stack, student_pb2_grpc.add_StudentServiceServicer_to_server, student)
            keeping = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            await scenario(student_pb2_grpc.StudentServiceStub(keeping), sums)

    asyncio.run(run())


async def refused(call: Awaitable[Any], code: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    assert failed.value.code().name == code, failed.value.details()
    return failed.value


async def violations(call: Awaitable[Any]) -> dict[str, str]:
    """Return what the call was refused for: the fields of google.rpc.BadRequest."""
    error = await refused(call, "INVALID_ARGUMENT")
    status = rpc_status.from_call(cast("grpc.Call", error))
    assert status
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    return {each.field: each.description for each in detail.field_violations}


def li(**more: Any) -> Student:
    return Student(**{"name": "李白", **more})


def test_what_is_added_is_returned_got_and_listed(database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        asked = li(age=61, score=[90, 95, 100], w=student_pb2.WEEK_SUNDAY, p={"weight": 60}, **{"class": "三班"})
        stored = await stub.AddFunc(asked)
        assert stored.id > 0
        assert stored == li(id=stored.id, total=285, **{d.name: v for d, v in asked.ListFields() if d.name != "name"})
        assert (await stub.Get(GetRequest(id=stored.id))).student == stored
        answer = await stub.List(ListRequest())
        assert list(answer.students) == [stored]
        assert answer.next_page_token == ""
        assert sums.calls == 2

    over_the_wire(database, scenario)


def test_sum_adds_up_pairs_at_once(database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        for score in ([], [7], [1, 2], list(range(1, 64)), [1000] * 64):
            sums.calls = 0
            assert (await stub.AddFunc(li(score=score))).total == sum(score)
            assert sums.calls == max(0, len(score) - 1)
        sums.calls, sums.gathers, sums.gathered = 0, 32, asyncio.Event()
        assert (await stub.AddFunc(li(score=[1000] * 64))).total == 64_000, "all pairs of the first round at once"

    over_the_wire(database, scenario)


def test_many_at_once_are_no_more_than_the_circuit_breaker_lets_pass(one_database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        sums.gathers = IN_FLIGHT
        answers = await asyncio.gather(*(stub.AddFunc(li(score=[1000] * 64)) for _ in range(64)))
        assert [answer.total for answer in answers] == [64_000] * 64

    over_the_wire(one_database, scenario)


def test_the_first_error_ends_the_other_calls_of_sum(one_database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        sums.refuses, sums.gathers = range(32, 33), 1000  # the others of the first round would never be answered
        await refused(stub.AddFunc(li(score=[1000] * 64)), "RESOURCE_EXHAUSTED")
        await asyncio.wait_for(sums.idle.wait(), 2)

    over_the_wire(one_database, scenario)


def test_the_largest_page_of_the_largest_students_fits_a_message() -> None:
    long = "\U0001f600" * 100
    largest = li(
        age=150,
        name=long,
        p={"weight": 1000},
        score=[1000] * 64,
        w=7,
        teacher=long,
        id=2**63 - 1,
        total=64_000,
    )
    assert student_pb2.ListResponse(students=[largest] * 1000).ByteSize() < 2_000_000


LIMITS: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": ""}),
    ("name", {"name": "李" * 101}),
    ("name", {"name": "a\0b"}),
    ("age", {"age": -1}),
    ("age", {"age": 151}),
    ("p.weight", {"p": {"weight": -1}}),
    ("p.weight", {"p": {"weight": 1001}}),
    ("score", {"score": [1] * 65}),
    ("score[1]", {"score": [1000, 1001]}),
    ("score[0]", {"score": [-1, 0]}),
    ("w", {"w": 1}),
    ("w", {"w": 8}),
    ("w", {"w": -1}),
    ("teacher", {"teacher": "x" * 101}),
    ("teacher", {"teacher": "\0"}),
    ("class", {"class": "x" * 101}),
    ("class", {"class": "\0"}),
    ("id", {"id": 1}),
    ("total", {"total": -1}),
]


@pytest.fixture
def one_database(tmp_path: Any) -> str:
    """Return the URL of a database for what does not get as far as the store."""
    return f"sqlite:///{tmp_path}/student.db"


def test_what_is_refused(one_database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        for field, fields in LIMITS:
            assert list(await violations(stub.AddFunc(li(**fields)))) == [field], fields
        for keys in (("",), ("x" * 129,), ("one", "two")):
            metadata = tuple(("idempotency-key", key) for key in keys)
            assert list(await violations(stub.AddFunc(li(), metadata=metadata))) == ["idempotency-key"], keys
        assert sums.calls == 0
        assert not (await stub.List(ListRequest())).students

    over_the_wire(one_database, scenario)


def test_all_that_is_wrong_is_told_at_once_and_fits_the_answer(one_database: str) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        everything = li(
            name="",
            age=-(2**31),
            p={"weight": -(2**31)},
            score=[-(2**31)] * 64,
            w=-(2**31),
            teacher="x" * 10**6,
            id=-(2**63),
            total=-(2**63),
        )
        found = await violations(stub.AddFunc(everything, metadata=(("idempotency-key", ""),)))
        scores = {f"score[{n}]" for n in range(8)}
        assert set(found) == scores | {
            "name",
            "teacher",
            "age",
            "p.weight",
            "score",
            "w",
            "id",
            "total",
            "idempotency-key",
        }
        assert "found 64" in found["score"]

    over_the_wire(one_database, scenario)


def test_a_key_again(database: str) -> None:
    """The same answer without another call of sum; another student under it is refused, and nothing is stored."""

    async def scenario(stub: Any, sums: CountingSum) -> None:
        for key in ("k", " ~" * 64):
            metadata = (("idempotency-key", key),)
            first = await stub.AddFunc(li(score=[1, 2], age=len(key)), metadata=metadata)
            calls = sums.calls
            assert await stub.AddFunc(li(score=[1, 2], age=len(key)), metadata=metadata) == first
            error = await refused(stub.AddFunc(li(score=[1, 3]), metadata=metadata), "FAILED_PRECONDITION")
            assert "another student was stored under this idempotency-key" in str(error.details())
            assert sums.calls == calls
        first = await stub.AddFunc(li())
        assert (await stub.AddFunc(li())).id > first.id, "without a key each is another"
        assert len((await stub.List(ListRequest())).students) == 4

    over_the_wire(database, scenario)


def test_a_key_twenty_times_at_once(database: str) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        calls = [stub.AddFunc(li(score=[1, 2]), metadata=(("idempotency-key", "k"),)) for _ in range(20)]
        answers = await asyncio.gather(*calls)
        assert [*(await stub.List(ListRequest())).students] * 20 == answers

    over_the_wire(database, scenario)


def test_without_a_total_nothing_is_stored(database: str) -> None:
    async def scenario(stub: Any, sums: CountingSum) -> None:
        sums.refuses = range(1, 4)
        metadata = (("idempotency-key", "k"),)
        error = await refused(stub.AddFunc(li(score=[1, 2, 3, 4]), metadata=metadata), "RESOURCE_EXHAUSTED")
        assert error.details() == "sum has had enough"
        assert not (await stub.List(ListRequest())).students
        sums.refuses = range(0)
        assert (await stub.AddFunc(li(score=[1, 2, 3, 4]), metadata=metadata)).total == 10

    over_the_wire(database, scenario)


def test_nobody_has_this_id(database: str) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        for number in (0, -1, 1, 2**63 - 1, -(2**63)):
            error = await refused(stub.Get(GetRequest(id=number)), "NOT_FOUND")
            assert f"no student has the id {number}" in str(error.details())

    over_the_wire(database, scenario)


def test_pages(database: str) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        ids = [(await stub.AddFunc(li(age=n))).id for n in range(60)]

        async def pages(size: int) -> list[list[int]]:
            found: list[list[int]] = []
            token = ""
            while not found or token:
                answer = await stub.List(ListRequest(page_size=size, page_token=token))
                found.append([student.id for student in answer.students])
                token = answer.next_page_token
            return found

        assert await pages(0) == [ids[:50], ids[50:]]
        assert await pages(20) == [ids[:20], ids[20:40], ids[40:]], "no empty page in the end"
        assert await pages(59) == [ids[:59], ids[59:]]
        for size in (60, 1000, 1001, 2**31 - 1):
            assert await pages(size) == [ids]

    over_the_wire(database, scenario)


def test_pages_that_cannot_be(one_database: str) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        bad = ListRequest(page_size=-1, page_token="?")  # noqa: S106 (not a secret)
        assert set(await violations(stub.List(bad))) == {
            "page_size",
            "page_token",
        }
        for made in ("1:0", "1:-1", "2:1", "1:01", f"1:{2**63}", "1:1\n", "1:\u0661", "1:", ""):
            token = base64.urlsafe_b64encode(made.encode()).decode().rstrip("=") or "="
            assert set(await violations(stub.List(ListRequest(page_token=token)))) == {"page_token"}, made

    over_the_wire(one_database, scenario)


@given(st.text(max_size=40) | st.text("AZaz09-_=", max_size=12))
@settings(max_examples=500, deadline=None)
def test_a_token_is_one_of_ours_or_refused(token: str) -> None:
    after = _after(token)
    assert after is None or (token == "" and after == 0) or _token(after) == token


@given(st.integers(1, 2**63 - 1))
@settings(deadline=None)
def test_a_token_of_ours_is_understood(last: int) -> None:
    assert _after(_token(last)) == last


def test_a_database_that_goes_and_comes_back(postgres: PostgreSQL) -> None:
    async def scenario(stub: Any, _: CountingSum) -> None:
        stored = await stub.AddFunc(li())
        await asyncio.to_thread(postgres.kill)
        try:
            for call in (stub.AddFunc(li()), stub.Get(GetRequest(id=1)), stub.List(ListRequest())):
                error = await refused(call, "UNAVAILABLE")
                assert (
                    error.details() == "the store of students does not answer; try again, with the same idempotency-key"
                )
        finally:
            await asyncio.to_thread(postgres.start)
        assert (await stub.Get(GetRequest(id=stored.id))).student == stored

    over_the_wire(postgres.url(postgres.create_database()), scenario)
