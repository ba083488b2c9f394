"""The chain student -> sum, and a store that loses nothing and keeps nothing twice, whatever is killed."""

import asyncio
import functools
import re
import time
import uuid
from collections import Counter
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from urllib.parse import quote

import grpc
import grpc.aio
import psutil
import pytest

import rollcall
from contracts.student.v1 import student_pb2, student_pb2_grpc
from rollcall import context
from tests.integration.fleet import CALLERS, Fleet, eventually
from tests.postgres import PASSWORD, PostgreSQL

SUMS = ("sum-1", "sum-2", "sum-3")
STUDENTS = ("student-1", "student-2", "student-3")
ADDED = 40  # students by each caller, at least
LI = student_pb2.Student(name="李白", age=61, score=[90, 95, 100])


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, fleet: Fleet, tmp_path: Path) -> str:
    """Have the fleet's students keep to one empty database; return its URL."""
    url = f"sqlite:///{tmp_path}/student.db"
    if request.param == "postgresql":
        server: PostgreSQL = request.getfixturevalue("postgres")
        url = server.url(server.create_database())
    fleet.environment["ROLLCALL_DATABASE"] = url
    return url


async def started(fleet: Fleet, *instances: str) -> None:
    for instance in instances:
        fleet.start(instance)
    for name in {instance.rpartition("-")[0] for instance in instances}:
        await fleet.pass_all(name, len([each for each in instances if each.startswith(name)]))


def logged(fleet: Fleet, instance: str, method: str, trace: str) -> list[tuple[str, float]]:
    """Return the status and milliseconds of each call of a method that an instance has logged under a trace."""
    found = re.findall(rf"{method} code=(\w+) ms=([\d.]+) trace={trace}$", fleet.log(instance), re.MULTILINE)
    return [(code, float(ms)) for code, ms in found]


@pytest.mark.usefixtures("database")
def test_the_chain(fleet: Fleet) -> None:
    """The answer has the total that sum has worked out, in the caller's trace; the password is nowhere to be read."""

    async def scenario() -> None:
        await started(fleet, "sum-1", "student-1")
        handled = context.incoming(None, None)
        context.current.set(handled)
        async with rollcall.dial("student", registry=fleet.registry) as channel:
            stored = await student_pb2_grpc.StudentServiceStub(channel).AddFunc(LI)
        assert (stored.name, stored.total) == ("李白", 285)
        await eventually("student's line", lambda: logged(fleet, "student-1", "AddFunc", handled.trace_id))
        _, took = await eventually(
            "sum's lines", lambda: len(logged(fleet, "sum-1", "Add", handled.trace_id)) == len(LI.score) - 1
        )
        assert took < 5

    asyncio.run(scenario())
    command = psutil.Process(fleet.process("student-1").pid).cmdline()
    for secret in (PASSWORD, quote(PASSWORD, safe="")):
        assert secret not in fleet.log("student-1") + " ".join(command)


def test_a_deadline_ends_the_whole_chain(fleet: Fleet, tmp_path: Path) -> None:
    fleet.environment["ROLLCALL_DATABASE"] = f"sqlite:///{tmp_path}/student.db"

    async def scenario() -> None:
        await started(fleet, "sum-1", "student-1")
        async with rollcall.dial("student", registry=fleet.registry) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)
            await stub.AddFunc(LI)
            handled = context.incoming(None, None)
            context.current.set(handled)
            fleet.signal("sum-1", SIGSTOP)
            try:
                begun = time.monotonic()
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await stub.AddFunc(LI, timeout=0.7)
                took = time.monotonic() - begun
                assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert took < 1.5
                lines, _ = await eventually(
                    "student's line", lambda: logged(fleet, "student-1", "AddFunc", handled.trace_id), 5
                )
                ((code, ms),) = lines
                assert code == "DEADLINE_EXCEEDED"
                assert ms < 1500
            finally:
                fleet.signal("sum-1", SIGCONT)
            context.current.set(None)
            listed = await stub.List(student_pb2.ListRequest(), wait_for_ready=True)
            assert len(listed.students) == 1, "nothing is stored of a call that ended"

    asyncio.run(scenario())


def test_without_sum(fleet: Fleet, tmp_path: Path) -> None:
    fleet.environment["ROLLCALL_DATABASE"] = f"sqlite:///{tmp_path}/student.db"

    async def scenario() -> None:
        await started(fleet, "student-1")
        async with rollcall.dial("student", registry=fleet.registry) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await stub.AddFunc(LI)
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "'sum'" in str(failed.value.details())
            assert not (await stub.List(student_pb2.ListRequest())).students

    asyncio.run(scenario())


@pytest.mark.trouble
@pytest.mark.usefixtures("database")
def test_nothing_is_lost_or_kept_twice(fleet: Fleet, report: list[str]) -> None:
    """16 callers add students, each again under its key until it has an answer; student and sum are killed."""
    answered: dict[str, student_pb2.Student] = {}
    failed: Counter[str] = Counter()
    over = asyncio.Event()

    async def add(stub: "student_pb2_grpc.StudentServiceAsyncStub", student: student_pb2.Student) -> None:
        """Add one, for as long as it takes. Its key is its name, to be found by."""
        patience = 0.05  # seconds: at first too little for many, whose students may have been stored all the same
        while student.name not in answered:
            try:
                call = stub.AddFunc(student, timeout=patience, metadata=(("idempotency-key", student.name),))
                answered[student.name] = await call
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                failed[error.code().name] += 1
                await asyncio.sleep(0.05)  # as a caller should who tries again
                patience = min(2 * patience, 5)

    async def scenario() -> None:
        await started(fleet, *SUMS, *STUDENTS)
        async with rollcall.dial("student", registry=fleet.registry) as channel:
            stub = student_pb2_grpc.StudentServiceStub(channel)

            async def caller(number: int) -> None:
                added = 0
                while added < ADDED or not over.is_set():
                    score = [number, added % 1000, 7]
                    await add(stub, student_pb2.Student(name=str(uuid.uuid4()), score=score))
                    added += 1

            begun = time.monotonic()
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for number in range(CALLERS):
                    group.create_task(caller(number))
                for instance in (*STUDENTS, "sum-2"):
                    enough = len(answered) + CALLERS
                    await eventually("students are added", functools.partial(more_than, answered, enough))
                    await asyncio.to_thread(fleet.kill, instance)
                    await asyncio.to_thread(fleet.start, instance)
                    await fleet.pass_all(instance.rpartition("-")[0], 3)
                over.set()
            took = time.monotonic() - begun
            kept = await everything(stub)
        report.append(
            f"{len(answered):,} students added in {took:.1f} s, calls made again: {dict(failed)}; {len(kept):,} kept"
        )
        assert {each.name: each for each in kept} == answered, "each that was answered is kept as it was answered"
        assert len(kept) == len(answered), "and kept once"
        assert all(each.total == sum(each.score) for each in kept)
        assert failed["UNAVAILABLE"], "nothing was killed that anybody called"

    asyncio.run(scenario())


def more_than(answered: dict[str, student_pb2.Student], count: int) -> bool:
    return len(answered) > count


async def everything(stub: "student_pb2_grpc.StudentServiceAsyncStub") -> list[student_pb2.Student]:
    kept: list[student_pb2.Student] = []
    token = ""
    while not kept or token:
        page = await stub.List(student_pb2.ListRequest(page_size=100, page_token=token))
        kept += page.students
        token = page.next_page_token
    return kept
