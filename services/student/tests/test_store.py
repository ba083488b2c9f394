"""The store, on each database."""

import asyncio
import logging
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import services.student.store as module
from contracts.student.v1.student_pb2 import Student
from rollcall import BadSettingError
from services.student.store import KeyTakenError, Store, StoreAwayError
from tests.postgres import PostgreSQL
from tests.waiting import free_port

LI = Student(age=333 % 150, name="李白", score=[90, 95], teacher="")


def within(database: str, scenario: Callable[[Store], Awaitable[None]], seconds: float = 30) -> None:
    async def run() -> None:
        async with asyncio.timeout(seconds), Store(database) as store:
            await scenario(store)

    asyncio.run(run())


async def never(_: Store) -> None:
    pytest.fail("it opened")


STUDENTS = {
    "least": Student(name="x"),
    "everything": Student(age=150, name="李白" * 50, p={"weight": 1000}, score=[1000] * 64, w=7, teacher="杜甫" * 50),  # type: ignore[arg-type]
    "people without weight": Student(name="x", p={}),  # type: ignore[arg-type]
    "teacher set to nothing": Student(name="x", teacher=""),
    "class set to nothing": Student(name="x", **{"class": ""}),  # type: ignore[arg-type]
    "class": Student(name="x", w=2, **{"class": "三班 \U0001f600\n'\"%s;--"}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS.keys())
def test_what_comes_out_is_what_went_in(database: str, student: Student) -> None:
    async def scenario(store: Store) -> None:
        stored = await store.add(student, 64_000)
        expected = Student(id=stored.id, total=64_000)
        expected.MergeFrom(student)
        assert stored == expected
        assert await store.get(stored.id) == stored
        assert await store.list(0, 10) == [stored]

    within(database, scenario)


def test_a_store_opened_again_has_what_was_stored(database: str) -> None:
    ids: list[int] = []

    async def first(store: Store) -> None:
        ids.append((await store.add(LI, 185, "key")).id)

    async def second(store: Store) -> None:
        assert (await store.add(LI, 185, "key")).id == ids[0]
        assert (await store.add(LI, 185)).id > ids[0]
        assert await store.get(10**15) is None
        assert await store.get(-1) is None

    within(database, first)
    within(database, second)


def test_one_key_at_once(database: str) -> None:
    """20 at the same time through two stores, as two processes would have them: one row, one answer."""

    async def scenario(store: Store) -> None:
        async with Store(database) as other:
            answers = await asyncio.gather(*([each.add(LI, 185, "a key") for each in (store, other) * 10]))
        assert all(answer == answers[0] for answer in answers)
        assert await store.list(0, 100) == [answers[0]]
        assert await store.find(LI, "a key") == answers[0]
        assert await store.find(LI, "A key") is None

    within(database, scenario)


def test_another_student_under_a_key(database: str) -> None:
    async def scenario(store: Store) -> None:
        await store.add(LI, 185, "key")
        for call in (store.add(Student(name="杜甫"), 0, "key"), store.find(Student(name="杜甫"), "key")):
            with pytest.raises(KeyTakenError):
                await call
        assert len(await store.list(0, 100)) == 1

    within(database, scenario)


def test_pages_hold_while_students_are_added(database: str) -> None:
    async def scenario(store: Store) -> None:
        first = [(await store.add(Student(name=f"{n}"), 0)).id for n in range(10)]
        seen: list[int] = []
        while page := await store.list(seen[-1] if seen else 0, 3):
            seen += [student.id for student in page]
            if len(seen) < 10:
                first.append((await store.add(LI, 0)).id)
        assert seen == first
        assert first == sorted(first)

    within(database, scenario)


# Starting


OPEN = (
    "import asyncio, sys; from services.student.store import Store\n"
    "async def main():\n    async with Store(sys.stdin.read()): pass\nasyncio.run(main())"
)


def test_three_that_start_at_once(database: str) -> None:
    starting = [
        subprocess.Popen([sys.executable, "-c", OPEN], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for each in starting:
        assert each.stdin
        each.stdin.write(database)
        each.stdin.close()
        each.stdin = None
    said = [each.communicate(timeout=60)[1] for each in starting]
    assert [each.returncode for each in starting] == [0, 0, 0], said
    assert said == ["", "", ""]


def test_a_database_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 1.0)
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(BadSettingError) as refused:
        within(f"postgresql://u:a-secret@127.0.0.1:{port}/db", never)
    assert time.monotonic() - begun < 5
    message = str(refused.value)
    assert f"cannot reach postgresql://u:***@127.0.0.1:{port}/db within 1 s: " in message
    assert "\n" not in message
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "said once"
    assert "a-secret" not in message + caplog.text


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadSettingError, match=r"missing/student\.db does not exist; make it"):
        within(f"sqlite:///{tmp_path}/missing/student.db", never)


# Being away


def test_a_database_that_restarts(postgres: PostgreSQL, caplog: pytest.LogCaptureFixture) -> None:
    """Calls fail while it is away and work once it is back; both are logged once, without secrets."""
    database = postgres.url(postgres.create_database())

    async def scenario(store: Store) -> None:
        stored = await asyncio.gather(*(store.add(LI, 185, f"{n}") for n in range(20)))
        for end in (postgres.stop, postgres.kill):
            caplog.clear()
            with caplog.at_level(logging.INFO, "services.student"):
                await asyncio.to_thread(end)
                try:
                    for _ in range(3):
                        with pytest.raises(StoreAwayError):
                            await store.get(stored[0].id)
                        with pytest.raises(StoreAwayError):
                            await store.add(LI, 185, "meanwhile")
                finally:
                    await asyncio.to_thread(postgres.start)
                for _ in range(3):
                    assert await store.list(0, 100) == sorted(stored, key=lambda each: each.id)
            away, back = caplog.messages
            assert "does not answer" in away
            assert "answers again" in back
            assert "secret" not in caplog.text

    within(database, scenario, 60)


def test_a_database_that_freezes(postgres: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1.0)

    async def scenario(store: Store) -> None:
        stored = await store.add(LI, 185)
        postgres.signal(signal.SIGSTOP)
        try:
            begun = time.monotonic()
            with pytest.raises(StoreAwayError):
                await store.get(stored.id)
            assert time.monotonic() - begun < 5
            with pytest.raises(TimeoutError):  # the caller's own deadline, which is nearer
                await asyncio.wait_for(store.get(stored.id), 0.2)
        finally:
            postgres.signal(signal.SIGCONT)
            monkeypatch.setattr(module, "SECONDS", 10.0)
        assert await store.get(stored.id) == stored

    within(postgres.url(postgres.create_database()), scenario)


def test_a_file_that_another_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer waits for the other; when that takes too long, the call ends and nothing is stored."""
    monkeypatch.setattr(module, "SECONDS", 0.5)

    async def scenario(store: Store) -> None:
        other = sqlite3.connect(tmp_path / "student.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreAwayError):
            await store.add(LI, 185, "key")
        assert await store.list(0, 10) == [], "readers read on"
        monkeypatch.setattr(module, "SECONDS", 10.0)
        asyncio.get_running_loop().call_later(0.2, other.execute, "ROLLBACK")
        stored = await store.add(LI, 185, "key")
        assert await store.list(0, 10) == [stored]
        other.close()

    within(f"sqlite:///{tmp_path}/student.db", scenario)


def test_what_a_caller_has_left_behind_ends_before_the_store_closes(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/student.db"

    async def leave(store: Store) -> None:
        other = sqlite3.connect(tmp_path / "student.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.add(LI, 185), 0.1)
        asyncio.get_running_loop().call_later(0.2, other.close)  # which `add` still waits for

    async def look(store: Store) -> None:
        assert len(await store.list(0, 10)) == 1

    within(database, leave)
    within(database, look)


# The password


def test_a_password_from_a_file_that_changes(postgres: PostgreSQL, tmp_path: Path) -> None:
    database = postgres.create_database()
    with postgres.connect() as connection:
        connection.execute("CREATE ROLE reader LOGIN SUPERUSER PASSWORD 'one'")
    secret = tmp_path / "password"
    secret.write_text("one\n")

    async def run() -> None:
        url = f"postgresql://reader@127.0.0.1:{postgres.port}/{database}"
        async with Store(url, str(secret)) as store:
            await store.add(LI, 185)
            with postgres.connect() as connection:
                connection.execute("ALTER ROLE reader PASSWORD 'two'")
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'reader'")
            with pytest.raises(StoreAwayError):
                await store.list(0, 10)
            secret.write_text("two\n")
            assert len(await store.list(0, 10)) == 1

    asyncio.run(run())


def test_a_wrong_password_is_told_of_and_not_told(
    postgres: PostgreSQL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.5)
    with pytest.raises(BadSettingError, match="password authentication failed") as refused:
        within(postgres.url("postgres", "not-the-secret"), never)
    assert "not-the-secret" not in str(refused.value) + caplog.text


def test_errors_tell_nothing_of_a_student(database: str) -> None:
    async def scenario(store: Store) -> None:
        with pytest.raises(ValueError, match="refuses a row") as failed:
            await store.add(LI, None)  # type: ignore[arg-type]
        assert LI.name not in "".join(traceback.format_exception(failed.value))

    within(database, scenario)
