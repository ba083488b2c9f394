"""A real PostgreSQL for tests: found on this machine or installed, and started in a folder of its own."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg
import pytest

from deploy.local.guard import Guard
from tests import debian
from tests.waiting import eventually, free_port

USER, PASSWORD = "rollcall", "a-secret/with:odd@characters"
START_SECONDS = 30


class PostgreSQL:
    """A server on a loopback port, which keeps its data when it is stopped or killed and started again."""

    def __init__(self, programs: Path, guard: Guard) -> None:
        self.port = free_port()
        self._programs, self._guard = programs, guard
        self._names = (f"test_{number}" for number in count(1))
        self._folder = Path(tempfile.mkdtemp(prefix="rollcall-postgres-"))  # pytest's own are closed to other users
        self._log = self._folder / "log"
        self._process: subprocess.Popen[Any] | None = None
        # It refuses to run as root.
        self._as: dict[str, Any] = {"cwd": self._folder}
        if os.getuid() == 0:
            names = {each.pw_name for each in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            self._as |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)  # its folder is closed to others
        options = ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--no-sync"]
        made = subprocess.run(
            [str(programs / "initdb"), "-D", "data", "--username", USER, "--pwfile", str(secret), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            **self._as,
        )
        assert made.returncode == 0, made.stdout

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self._folder}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._programs / "postgres"),
                    "-D",
                    "data",
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as,
            )
        self._guard.watch(self._process.pid)
        eventually("PostgreSQL answers", self._answers, START_SECONDS)

    def stop(self) -> None:
        """Stop it: what is being done is ended, and what was committed stays."""
        assert self._process
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=20)

    def kill(self) -> None:
        """Kill -9 it and every process it has started."""
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, SIGSTOP say, to it and every process it has started."""
        assert self._process
        server = psutil.Process(self._process.pid)
        processes = [server, *server.children(recursive=True)]  # which lead sessions of their own
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        if number is signal.SIGKILL:
            self._process.wait(timeout=20)
            psutil.wait_procs(processes, timeout=20)

    def url(self, database: str, password: str = PASSWORD) -> str:
        """Return the URL of a database, with the password in it."""
        return f"postgresql://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Make an empty database and return its name."""
        name = next(self._names)
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return name

    def connect(self, database: str = "postgres") -> "psycopg.Connection[Any]":
        """Connect as the owner of all databases."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            autocommit=True,
            connect_timeout=5,
        )

    def close(self) -> None:
        """Kill it, and remove what it has written."""
        if self._process and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"PostgreSQL ended:\n{self._log.read_text()[-4000:]}"
        with contextlib.suppress(psycopg.OperationalError):
            self.connect().close()
            return True
        return False


def programs() -> Path:
    """Return the folder of PostgreSQL's programs; installs Debian's package if need and may be, else skips the test."""
    found = _found()
    if found is None:
        debian.install("postgresql")
        found = _found()
    if found is None:
        pytest.skip(
            "no PostgreSQL: looked for initdb on PATH, where pg_config says, and in /usr/lib/postgresql/*/bin, and it "
            "could not be installed here as Debian's package: install PostgreSQL, or put its bin folder on PATH"
        )
    return found


def _found() -> Path | None:
    candidates = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    if pg_config := shutil.which("pg_config"):
        said = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, timeout=10, check=False).stdout
        candidates.append(Path(said.strip()))
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(debian, key=lambda each: float(each.parent.name), reverse=True)
    return next((each for each in candidates if (each / "initdb").exists() and (each / "postgres").exists()), None)


@contextlib.contextmanager
def running() -> Iterator[PostgreSQL]:
    """Run a server; skips the test if there is none to be had."""
    with Guard() as guard, contextlib.closing(PostgreSQL(programs(), guard)) as server:
        server.start()
        yield server
