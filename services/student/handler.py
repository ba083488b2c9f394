"""What student does."""

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc.aio import ServicerContext

import rollcall
from contracts.student.v1 import student_pb2, student_pb2_grpc
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc
from services.student.store import KeyTakenError, Store, StoreAwayError

KEY = "idempotency-key"
OLDEST = 150  # years
LONGEST = 100  # characters of a name, a teacher, a class
HEAVIEST = 1000
SCORES, BEST = 64, 1000
IN_FLIGHT = 256
"""The most calls of sum that one instance has in flight, for all it is asked together.

32 callers whose students have the most scores would make 1,024 at once: as many as the circuit breaker of the channel
lets pass, and it refuses the rest, though nothing is wrong. A quarter of that keeps sum as busy.
"""
NAMED = 8  # scores at fault that an answer names: gRPC's metadata has room for 8 kB
PAGE, LARGEST_PAGE = 50, 1000  # 1000 of the largest students are 1 MB; gRPC's messages have 4


class Student(student_pb2_grpc.StudentServiceServicer):
    """Keeps students in a store, and has sum add up their scores."""

    def __init__(self, store: Store, sums: "sum_pb2_grpc.SumServiceAsyncStub") -> None:
        self._store, self._sums = store, sums
        self._free = asyncio.Semaphore(IN_FLIGHT)

    async def AddFunc(
        self, request: student_pb2.Student, context: "ServicerContext[student_pb2.Student, student_pb2.Student]"
    ) -> student_pb2.Student:
        """Store a student and return it as stored; once under each idempotency key."""
        keys = [value for name, value in context.invocation_metadata() or () if name == KEY]
        violations = _violations(request)
        if len(keys) > 1 or any(not re.fullmatch("[ -~]{1,128}", str(key)) for key in keys):
            violations[KEY] = "must be one, of 1 to 128 printable ASCII characters"
        if violations:
            await rollcall.refuse(context, violations)
        key = str(keys[0]) if keys else None
        async with _reported(context):
            stored = None if key is None else await self._store.find(request, key)
            if stored is None:
                stored = await self._store.add(request, await self._total(request.score), key)
        return stored

    async def Get(
        self,
        request: student_pb2.GetRequest,
        context: "ServicerContext[student_pb2.GetRequest, student_pb2.GetResponse]",
    ) -> student_pb2.GetResponse:
        """Return the student with an id."""
        async with _reported(context):
            student = await self._store.get(request.id)
        if student is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no student has the id {request.id}; List returns all")
        return student_pb2.GetResponse(student=student)

    async def List(
        self,
        request: student_pb2.ListRequest,
        context: "ServicerContext[student_pb2.ListRequest, student_pb2.ListResponse]",
    ) -> student_pb2.ListResponse:
        """Return a page of students."""
        after = _after(request.page_token)
        violations = {}
        if request.page_size < 0:
            violations["page_size"] = f"must not be negative, found {request.page_size}"
        if after is None:
            violations |= {"page_token": "must be the next_page_token of a page before, or empty"}
        if violations or after is None:
            await rollcall.refuse(context, violations)
        size = min(request.page_size or PAGE, LARGEST_PAGE)
        async with _reported(context):
            found = await self._store.list(after, size + 1)
        page = found[:size]
        return student_pb2.ListResponse(students=page, next_page_token=_token(page[-1].id) if found[size:] else "")

    async def _total(self, score: Sequence[int]) -> int:
        """Have sum add up the scores: all pairs at once, then the pairs of their sums. Raises the first error."""
        values = list(score)
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=False)  # of an odd number the last goes to the next round
            try:
                async with asyncio.TaskGroup() as group:  # without one of them the others are of no use
                    answers = [group.create_task(self._add(a, b)) for a, b in pairs]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            values = [answer.result() for answer in answers] + values[len(answers) * 2 :]
        return sum(values)

    async def _add(self, a: int, b: int) -> int:
        async with self._free:
            return (await self._sums.Add(sum_pb2.AddRequest(num1=a, num2=b))).res


@contextlib.asynccontextmanager
async def _reported(context: "ServicerContext[Any, Any]") -> AsyncIterator[None]:
    """End the call with the status that an error of the store stands for."""
    try:
        yield
    except KeyTakenError:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"another student was stored under this {KEY}; give each student a key of its own",
        )
    except StoreAwayError:
        await context.abort(
            grpc.StatusCode.UNAVAILABLE, f"the store of students does not answer; try again, with the same {KEY}"
        )


def _violations(student: student_pb2.Student) -> dict[str, str]:
    """Return what is wrong with a student that is to be stored, by field."""
    found = {}
    if not student.name:
        found["name"] = "must not be empty"
    for field in ("name", "teacher", "class"):
        text = getattr(student, field)
        if len(text) > LONGEST:
            found[field] = f"must have at most {LONGEST} characters, found {len(text)}"
        elif "\0" in text:  # PostgreSQL cannot keep it
            found[field] = "must not have the character U+0000"
    for field, value, most in (("age", student.age, OLDEST), ("p.weight", student.p.weight, HEAVIEST)):
        if not 0 <= value <= most:
            found[field] = f"must be from 0 to {most}, found {value}"
    found.update(_violations_of(student.score))
    if student.w not in student_pb2.Week.values():
        found["w"] = f"must be a day of the week, one of {student_pb2.Week.values()}, found {student.w}"
    for field in ("id", "total"):
        if getattr(student, field):
            found[field] = f"must not be set: the service does, found {getattr(student, field)}"
    return found


def _violations_of(score: Sequence[int]) -> dict[str, str]:
    if len(score) > SCORES:
        return {"score": f"must be at most {SCORES}, found {len(score)}"}
    wrong = [(number, each) for number, each in enumerate(score) if not 0 <= each <= BEST]
    found = {f"score[{number}]": f"must be from 0 to {BEST}, found {each}" for number, each in wrong[:NAMED]}
    if wrong[NAMED:]:
        found["score"] = f"must each be from 0 to {BEST}, found {len(wrong)} that are not"
    return found


def _token(last: int) -> str:
    """Return the token of the page after the student with this id. It tells its version, to be another some day."""
    return base64.urlsafe_b64encode(f"1:{last}".encode()).decode().rstrip("=")


def _after(token: str) -> int | None:
    """Return the id that a page starts after; None for a token that `_token` has not made."""
    if not token:
        return 0
    with contextlib.suppress(ValueError):  # not ASCII, or not base64
        found = re.fullmatch(
            r"1:([1-9]\d{0,18})", base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode("ascii")
        )
        if found and _token(int(found[1])) == token and int(found[1]) < 2**63:
            return int(found[1])
    return None
