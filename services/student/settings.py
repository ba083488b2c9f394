"""The settings of one instance of student."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from rollcall import ServiceSettings
from rollcall.settings import PREFIX

FORMS = "sqlite:///relative.db, sqlite:////absolute.db or postgresql://user@host:port/database"
SCHEMES = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class _Given(str):
    """The URL of a database as it was given; its repr, which an error shows, leaves out what may be a password."""

    __slots__ = ()

    def __repr__(self) -> str:
        scheme, rest = re.fullmatch(r"([\w+]+://)?(.*)", self, re.DOTALL).groups("")  # type: ignore[union-attr]
        return repr(f"{scheme}..." if re.search("[:@?]", rest) else str(self))


def parse(database: str) -> URL:
    """Return a database's URL as SQLAlchemy takes it. Raises ValueError, without the URL, for one of another form."""
    try:
        url = make_url(database)
        driver = SCHEMES[url.drivername]
    except (ArgumentError, ValueError, KeyError):
        raise ValueError(f"expected {FORMS}") from None
    sqlite = url.drivername == "sqlite"
    if not url.database or sqlite == bool(url.host) or url.query or url.database == ":memory:":
        raise ValueError(f"expected {FORMS}")
    return url.set(drivername=driver)


def _check(database: str) -> str:
    if parse(database).password is not None and database != os.environ.get(f"{PREFIX}DATABASE"):
        raise ValueError(
            f"expected no password in it, as everybody on the machine can read a command line: put the URL into "
            f"{PREFIX}DATABASE, or the password into a file that --database-password-file names"
        )
    return _Given(database)


def _given(value: Any) -> Any:
    return _Given(value) if isinstance(value, str) else value


class StudentSettings(ServiceSettings):
    """The settings of every service, and where students are kept."""

    # Validators apply from right to left: `_check` sees, and an error shows, what `_given` has made of the value.
    database: Annotated[str, AfterValidator(_check), BeforeValidator(_given)] = Field(
        "sqlite:///student.db",
        description=f"where students are kept: {FORMS}; a password goes into {PREFIX}DATABASE or a file, not here",
    )
    database_password_file: str = Field("", description="file that holds the password, read at every connect")
