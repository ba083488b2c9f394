"""Where students are kept: a table in SQLite or PostgreSQL, by the same code."""

import asyncio
import hashlib
import logging
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    Result,
    RowMapping,
    Select,
    String,
    Table,
    event,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError, InterfaceError, InternalError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from contracts.student.v1 import student_pb2
from rollcall import BadSettingError
from rollcall.settings import PREFIX
from services.student import migrations
from services.student.settings import parse

T = TypeVar("T")
log = logging.getLogger(__name__)

START_SECONDS = 30.0
"""How long a database that cannot be reached is waited for at the start."""
SECONDS = 10.0
"""The longest that anything asked of the database may take. A caller with less time left does not wait for it."""
CONNECT_SECONDS = 3
CONNECTIONS = 8
"""The most connections of one instance."""
LOOK_AGAIN = (0.001, 0.01)
"""Between which seconds an instance looks again whether SQLite's one writer, in another process, has done."""
BUSY = "database is locked"
"""What SQLite says until then: the text of its status SQLITE_BUSY."""

metadata = MetaData(naming_convention={"pk": "pk_%(table_name)s", "uq": "uq_%(table_name)s_%(column_0_name)s"})

# SQLite numbers rows by itself only under the type INTEGER, which has 64 bits there.
students = Table(
    "students",
    metadata,
    Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
    Column("age", Integer, nullable=False),
    Column("name", String(100), nullable=False),
    Column("weight", Integer),  # null: no People
    Column("score", JSON, nullable=False),
    Column("w", Integer, nullable=False),
    Column("teacher", String(100)),  # of teacher and class at least one is null
    Column("class", String(100)),
    Column("total", BigInteger, nullable=False),
    Column("idempotency_key", String(128), unique=True),
    Column("request_digest", LargeBinary, nullable=False),
    sqlite_autoincrement=True,  # an id is given once
)

_AWAY = (OperationalError, InterfaceError, InternalError, OSError)  # TimeoutError is an OSError


class StoreAwayError(Exception):
    """The database does not answer, or not in time. Whether what was asked has been done is not known."""


class KeyTakenError(Exception):
    """Another student was stored under the idempotency key."""


class Store:
    """The students.

    async with Store("sqlite:///student.db") as store:
        stored = await store.add(Student(name="李白"), total=0)

    Entering it brings the database to the newest revision, and waits for one that cannot be reached. The methods raise
    `StoreAwayError`; once the database is back they work again.
    """

    def __init__(self, database: str, password_file: str = "") -> None:
        """Take a database's URL, in a form that `settings.parse` knows, and where to read its password, if it has one.

        A password file is read at every connect, so that the password can be changed while instances run.
        """
        url = parse(database)
        self.shown = url.set(drivername=url.get_backend_name()).render_as_string()
        """The URL without the password, for people to read."""
        self._engine = _engine(url, password_file)
        self._tasks: set[asyncio.Task[Any]] = set()
        # SQLite has one writer at a time: of one process, no more than one contends with those of the others.
        self._writers = asyncio.Semaphore(1 if url.get_backend_name() == "sqlite" else CONNECTIONS // 2)
        self._readers = asyncio.Semaphore(CONNECTIONS // 2)
        self._away = False

    async def __aenter__(self) -> Self:
        try:
            await self._reach()
        except BaseException:
            await self._engine.dispose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._tasks:  # what callers have left behind ends by itself, see `_transaction`
            await asyncio.wait(self._tasks, timeout=SECONDS)
        await self._engine.dispose()
        for task in self._tasks:
            task.cancel()

    async def add(self, student: student_pb2.Student, total: int, key: str | None = None) -> student_pb2.Student:
        """Store a student and return it as stored; under a key that has one already, return that.

        Raises `KeyTakenError` if it has another.
        """
        row = {**_row(student), "total": total, "idempotency_key": key, "request_digest": _digest(student)}

        async def run(connection: AsyncConnection) -> None:
            result = await connection.execute(insert(students).values(row).returning(students.c.id))
            row["id"] = result.scalar_one()

        try:
            await self._transaction(run, self._writers)
        except IntegrityError as error:  # the one that came first has been committed, or this would still wait for it
            found = None if key is None else await self.find(student, key)
            if found is None:  # PostgreSQL's own message would have the values in it
                raise ValueError(f"{self.shown} refuses a row: {type(error.orig).__name__}") from None
            return found
        return _student(row)

    async def find(self, student: student_pb2.Student, key: str) -> student_pb2.Student | None:
        """Return what this student has been stored as under a key, or None. Raises `KeyTakenError` for another one."""
        rows = await self._read(select(students).where(students.c.idempotency_key == key))
        if rows and rows[0]["request_digest"] != _digest(student):
            raise KeyTakenError
        return _student(rows[0]) if rows else None

    async def get(self, number: int) -> student_pb2.Student | None:
        """Return the student with an id, or None."""
        rows = await self._read(select(students).where(students.c.id == number))
        return _student(rows[0]) if rows else None

    async def list(self, after: int, limit: int) -> list[student_pb2.Student]:
        """Return up to `limit` students with the next ids above `after`, in their order."""
        rows = await self._read(select(students).where(students.c.id > after).order_by(students.c.id).limit(limit))
        return [_student(row) for row in rows]

    async def _read(self, query: Select[Any]) -> Sequence[RowMapping]:
        async def run(connection: AsyncConnection) -> Sequence[RowMapping]:
            result: Result[Any] = await connection.execute(query)
            return result.mappings().all()

        return await self._transaction(run, self._readers)

    async def _transaction(self, run: Callable[[AsyncConnection], Awaitable[T]], free: asyncio.Semaphore) -> T:
        """Run something in a transaction of its own as soon as one is `free`, and commit it; wait at most `SECONDS`.

        It runs in a task that a caller who leaves, at a deadline say, leaves behind. A statement of aiosqlite's that is
        ended half-way may hold SQLite's lock for ever, and whoever ends one of psycopg's waits for a frozen server.
        """
        try:
            async with asyncio.timeout(SECONDS):
                await free.acquire()
                task = asyncio.create_task(self._run(run))
                self._tasks.add(task)
                task.add_done_callback(lambda task: self._ended(task, free))
                result = await asyncio.shield(task)
        except _AWAY as error:
            if not self._away:  # it is logged once that it goes, and that it comes back
                self._away = True
                log.warning("%s does not answer: %s", self.shown, _reason(error))
            raise StoreAwayError from None
        if self._away:
            self._away = False
            log.info("%s answers again", self.shown)
        return result

    async def _run(self, run: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        begun = time.monotonic()
        while True:
            try:
                async with self._engine.begin() as connection:
                    return await run(connection)
            except OperationalError as error:
                if not _busy(error) or time.monotonic() - begun > SECONDS:
                    raise
            # SQLite's own way to wait for another process's transaction looks again after up to 0.1 s; one that writes
            # on meanwhile takes the lock each time.
            await asyncio.sleep(random.uniform(*LOOK_AGAIN))  # noqa: S311 (spreads attempts, guards nothing)

    def _ended(self, task: "asyncio.Task[Any]", free: asyncio.Semaphore) -> None:
        free.release()
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # which nobody may be left to look at

    async def _reach(self) -> None:
        """Migrate the database, waiting for it for up to `START_SECONDS`. Raises `BadSettingError`."""
        name = self._engine.url.database or ""
        if self._engine.dialect.name == "sqlite" and not Path(name).parent.is_dir():
            raise BadSettingError(
                f"setting --database ({PREFIX}DATABASE): the folder of {self.shown} does not exist; make it, or name "
                f"another"
            )
        begun, pause, said = time.monotonic(), 0.1, False
        while True:
            try:
                async with self._engine.begin() as connection:
                    before, after = await connection.run_sync(_migrate)
            except _AWAY as error:
                reason = _reason(error)
            except migrations.UnknownRevisionError as error:
                raise BadSettingError(f"setting --database ({PREFIX}DATABASE): {self.shown} {error}") from None
            else:
                if before != after:
                    log.info("%s is migrated from revision %s to %s", self.shown, before or "none", after)
                return
            if time.monotonic() - begun + pause > START_SECONDS:
                raise BadSettingError(
                    f"setting --database ({PREFIX}DATABASE): cannot reach {self.shown} within {START_SECONDS:g} s: "
                    f"{reason}; start it, or name another"
                ) from None
            if not said and reason != BUSY:
                said = True
                log.warning("cannot reach %s: %s; trying again for up to %g s", self.shown, reason, START_SECONDS)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)


def _engine(url: Any, password_file: str) -> AsyncEngine:
    sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any] = (
        {"timeout": 0}  # `Store` waits for the transactions of others by itself
        if sqlite
        else {
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "student",
            "options": f"-c statement_timeout={SECONDS:g}s",  # what nobody waits for any more shall not go on
            # A server whose machine is gone is noticed, which the operating system by itself would do after hours.
            "tcp_user_timeout": int(SECONDS * 1000),
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
        }
    )
    engine = create_async_engine(
        url,
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=not sqlite,
        hide_parameters=True,  # errors are logged, and a student's data shall not be
        connect_args=arguments,
    )
    if sqlite:
        event.listen(engine.sync_engine, "connect", _keep_safe)
    elif password_file:

        def read_password(_dialect: Any, _record: Any, _positional: Any, named: dict[str, Any]) -> None:
            named["password"] = Path(password_file).read_text().rstrip("\r\n")

        event.listen(engine.sync_engine, "do_connect", read_password)
    return engine


def _keep_safe(connection: Any, _record: Any) -> None:
    """Have SQLite let others read while one writes, and acknowledge what is on the disk and not before."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _migrate(connection: Connection) -> tuple[str | None, str | None]:
    return migrations.upgrade(connection, metadata)


def _busy(error: OperationalError) -> bool:
    """Say whether SQLite has answered that another transaction has to end first."""
    return isinstance(error.orig, sqlite3.OperationalError) and str(error.orig) == BUSY


def _reason(error: Exception) -> str:
    """Return why the database cannot be used, in one line. Neither driver tells the password in its errors."""
    return " ".join(str(getattr(error, "orig", None) or error).split()) or f"no answer within {SECONDS:g} s"


def _digest(student: student_pb2.Student) -> bytes:
    """Return what tells one request from another."""
    return hashlib.sha256(student.SerializeToString(deterministic=True)).digest()


def _row(student: student_pb2.Student) -> dict[str, Any]:
    data = student.WhichOneof("data")
    return {
        "age": student.age,
        "name": student.name,
        "weight": student.p.weight if student.HasField("p") else None,
        "score": list(student.score),
        "w": student.w,
        "teacher": student.teacher if data == "teacher" else None,
        "class": getattr(student, "class") if data == "class" else None,
    }


def _student(row: RowMapping | dict[str, Any]) -> student_pb2.Student:
    weight = row["weight"]
    fields = {name: row[name] for name in ("id", "age", "name", "score", "w", "teacher", "class", "total")}
    return student_pb2.Student(**fields, p=None if weight is None else student_pb2.People(weight=weight))
