"""Where students are kept, as it is given; and a password that nobody reads who should not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollcall import BadSettingError
from rollcall.settings import load
from services.student.settings import StudentSettings, parse

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in StudentSettings.model_fields:
        monkeypatch.delenv(f"ROLLCALL_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("database", "url"),
    [
        ("sqlite:///student.db", "sqlite+aiosqlite:///student.db"),
        ("sqlite:////var/lib/student.db", "sqlite+aiosqlite:////var/lib/student.db"),
        ("postgresql://user@host:5433/db", "postgresql+psycopg://user@host:5433/db"),
        ("postgres://user@[::1]/db", "postgresql+psycopg://user@[::1]/db"),
    ],
)
def test_forms(database: str, url: str) -> None:
    assert load(StudentSettings, ["--database", database]).database == database
    assert parse(database).render_as_string() == url


def test_the_default() -> None:
    assert load(StudentSettings, []).database == "sqlite:///student.db"


BAD = [
    "",
    "student.db",
    "sqlite://student.db",
    "sqlite://",
    "sqlite:///:memory:",
    "sqlite:///student.db?mode=ro",
    "mysql://user:a-secret@host/db",
    "postgresql+asyncpg://user:a-secret@host/db",
    "postgresql://user:a-secret@host",
    "postgresql://user:a-secret@host:port/db",
    "postgresql:///db",
    "postgresql://host/db?password=a-secret",
    "user:a-secret@host/db",
    "postgresql:\n//user:a-secret@host/db",
]


@pytest.mark.parametrize("database", BAD)
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, database: str, way: str) -> None:
    monkeypatch.setenv("ROLLCALL_DATABASE", database if way == "environment" else "")
    with pytest.raises(BadSettingError, match=r"--database \(ROLLCALL_DATABASE\): .*expected sqlite:///") as refused:
        load(StudentSettings, ["--database", database] if way == "flag" else [])
    assert "a-secret" not in str(refused.value)


def test_a_password_on_the_command_line_is_refused() -> None:
    with pytest.raises(BadSettingError, match=r"found 'postgresql://\.\.\.'") as refused:
        load(StudentSettings, ["--database", "postgresql://user:a-secret@host/db"])
    assert "ROLLCALL_DATABASE" in str(refused.value)
    assert "a-secret" not in str(refused.value)


def test_a_password_in_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://user:a-secret@host/db"
    monkeypatch.setenv("ROLLCALL_DATABASE", url)
    settings = load(StudentSettings, [])
    assert settings.database == url
    assert "a-secret" not in f"{settings!r} {settings}"
    helped = subprocess.run(
        [sys.executable, "-m", "services.student", "--help"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert helped.returncode == 0
    assert "--database-password-file" in helped.stdout
    assert "a-secret" not in helped.stdout + helped.stderr
