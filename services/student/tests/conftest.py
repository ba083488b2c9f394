"""The databases that the tests run on: SQLite and a real PostgreSQL."""

from pathlib import Path

import pytest

from tests.postgres import PostgreSQL


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/student.db"
    server: PostgreSQL = request.getfixturevalue("postgres")
    return server.url(server.create_database())
