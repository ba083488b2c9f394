"""The revisions of the database, on each database."""

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from rollcall import BadSettingError
from services.student.migrations import upgrade
from services.student.settings import parse
from services.student.store import Store, metadata


def on(database: str, *statements: str) -> list[tuple[str | None, str | None]]:
    """Migrate a database after each of these statements; return what revisions it went from and to."""

    async def run() -> list[tuple[str | None, str | None]]:
        went = []
        engine = create_async_engine(parse(database))
        for statement in statements:
            async with engine.begin() as connection:
                await connection.execute(text(statement))
            async with engine.begin() as connection:
                went.append(await connection.run_sync(upgrade, metadata))
        await engine.dispose()
        return went

    return asyncio.run(run())


def test_from_nothing_and_again(database: str) -> None:
    assert on(database, "SELECT 1", "SELECT 1") == [(None, "0001"), ("0001", "0001")]


def test_the_revisions_make_what_the_code_works_with(database: str) -> None:
    def differences(connection: Connection) -> object:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, metadata)

    async def run() -> object:
        async with Store(database) as store, store._engine.connect() as connection:  # noqa: SLF001
            return await connection.run_sync(differences)

    assert asyncio.run(run()) == []


def test_one_that_fails_leaves_nothing_behind(database: str) -> None:
    """A database in which a table is in the way stays as it was, and is migrated once that has gone."""
    with pytest.raises(Exception, match="already exists"):
        on(database, "CREATE TABLE students (mine integer)")
    assert on(database, "DROP TABLE students") == [(None, "0001")]


def test_a_newer_database_is_refused(database: str) -> None:
    on(database, "SELECT 1")
    with pytest.raises(Exception, match="revision 9999"):
        on(database, "UPDATE alembic_version SET version_num = '9999'")

    async def run() -> None:
        async with Store(database):
            pytest.fail("it opened")

    with pytest.raises(BadSettingError, match="is of revision 9999, and this code knows none after 0001"):
        asyncio.run(run())
