"""What comes over the network may be anything: hello, a process of its own, is sent all sorts of it."""

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.local.guard import Guard
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SECONDS = 20.0
MB = 1_000_000


class Served:
    """The process, and what it has to be well."""

    def __init__(self, log: Path, guard: Guard, **limits: float) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.jsonrpc_hello", json.dumps(limits)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # the guard kills process groups
            )
        guard.watch(self._popen.pid)
        assert self._popen.stdout
        self.port = int(self._popen.stdout.readline())
        self._process = psutil.Process(self._popen.pid)
        self._steady = self.connect()
        for _ in range(100):
            self.greet()  # so that what every server needs in memory is there
        self.before = self.memory()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def memory(self) -> int:
        return int(self._process.memory_info().rss)

    def greet(self) -> None:
        """Make a call that must be answered, on a connection that stays."""
        self._steady.sendall('{"method":"hello.HelloWorld","params":["李白"],"id":7}'.encode())
        assert self._steady.recv(1000).decode() == '{"id":7,"result":"李白 你好","error":null}\n'

    def assert_well(self, megabytes: float) -> None:
        """Have a call answered, nothing logged, and no more memory taken than that."""
        self.greet()
        assert self._log.read_text() == ""
        assert self.memory() - self.before < megabytes * MB

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._steady.close()
        self._popen.kill()
        self._popen.wait()
        assert self._popen.stdout
        self._popen.stdout.close()


@pytest.fixture
def served(tmp_path: Path, guard: Guard, request: pytest.FixtureRequest) -> Iterator[Served]:
    with Served(tmp_path / "log", guard, **getattr(request, "param", {})) as served:
        yield served


def limited(**limits: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("served", [limits], indirect=True, ids=[""])


def replies(connection: socket.socket) -> list[Any]:
    """Return the replies that come until the server closes."""
    said = bytearray()
    with contextlib.suppress(ConnectionResetError):  # it may close with something unread
        while chunk := connection.recv(65_536):
            said += chunk
    return [json.loads(line) for line in said.splitlines()]


def send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(data)


VALID = '{"method":"hello.HelloWorld","params":["李白"],"id":1}'.encode()
# Drawing a case costs more than to send it: what is drawn is kept small.
names = st.text(max_size=8)
leaves = st.sampled_from((None, True, 0, -1, 1.5, 10**30, 1e308, float("nan"), "", "李", "\ud800", "\0")) | names
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2))
requests = st.builds(
    lambda method, params, request_id: {"method": method, "params": params, "id": request_id},
    st.sampled_from(("hello.HelloWorld", "hello.X", "x.HelloWorld", "", 5, None)) | names,
    st.lists(leaves, max_size=2) | values,
    leaves,
)
texts = (requests | values).map(json.dumps).map(str.encode)  # json also writes NaN, which is not JSON


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a valid request in which something is other, missing or doubled, and another after it."""
    at, length = draw(st.integers(0, len(VALID) - 1)), draw(st.integers(0, 8))
    return VALID[:at] + draw(st.binary(max_size=4) | st.just(VALID[at:][:length])) + VALID[at + length :] + VALID


streams = st.binary(max_size=100) | mutated() | texts | st.lists(texts, max_size=3).map(VALID.join)


def test_ten_thousand_streams(served: Served) -> None:
    """Whatever comes is answered with JSON-RPC or not at all, and the next one as if it had not come."""
    begun, cases = time.monotonic(), 0

    @settings(
        max_examples=10_000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(stream=streams, cut=st.sampled_from((1000, 1000, 16, 3)))
    def answers(stream: bytes, cut: int) -> None:
        nonlocal cases
        cases += 1
        with served.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(stream), cut):
                send(connection, stream[at : at + cut])
            with contextlib.suppress(OSError):  # it may have closed already
                connection.shutdown(socket.SHUT_WR)
            for reply in replies(connection):
                assert set(reply) == {"id", "result", "error"}
                assert isinstance(reply["error"], str) != isinstance(reply["result"], str)
        served.greet()

    answers()
    taken = time.monotonic() - begun
    served.assert_well(30)
    print(f"{cases:,} streams in {taken:.0f} s; {(served.memory() - served.before) / MB:+.1f} MB of memory")
    assert cases >= 10_000


def test_byte_by_byte(served: Served) -> None:
    name = "白" * 33_000 + '"\\'
    message = json.dumps({"method": "hello.HelloWorld", "params": [name], "id": 1}, ensure_ascii=False).encode()
    assert len(message) > 99_000
    with served.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in message:
            connection.send(bytes((byte,)))
        connection.shutdown(socket.SHUT_WR)
        assert replies(connection) == [{"id": 1, "result": f"{name} 你好", "error": None}]
    served.assert_well(5)


ENDLESS = {
    "string": (b'{"method":"', b"x"),
    "number": (b'{"id":', b"1"),
    "array": (b'{"params":[1', b",1"),
    "escapes": (b'{"method":"', b"\\n"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_message_that_never_ends(served: Served, kind: str) -> None:
    """It is cut off at a megabyte; the sender notices by what it can send."""
    begin, again = ENDLESS[kind]
    sent, most, chunk = 0, 0, again * (65_536 // len(again))
    with served.connect() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(begin)
        while sent < 200 * MB:
            sent += connection.send(chunk)
            most = max(most, served.memory())
    assert sent < 20 * MB  # what was read, and what the kernel held at both ends
    assert most - served.before < 8 * MB
    served.assert_well(8)


def test_spaces_that_never_end(served: Served) -> None:
    """They are no message, so there is nothing to cut off; they cost no memory."""
    with served.connect() as connection:
        for _ in range(1000):
            connection.sendall(b" " * 65_536)
        connection.sendall(VALID)
        assert json.loads(connection.recv(1000))["id"] == 1
    served.assert_well(8)


@pytest.mark.parametrize("bracket", [b"[", b'{"a":', b'{"params":[{"a":[['])
def test_nesting(served: Served, bracket: bytes) -> None:
    with served.connect() as connection:
        send(connection, b'{"params":' + bracket * 100_000)
        for reply in replies(connection):  # unless it was lost with what the server left unread
            assert reply["error"].endswith("expected at most 32 levels of nesting, found more")
    served.assert_well(8)


@limited(idle=1)
def test_a_peer_that_never_reads(served: Served) -> None:
    """It is read no further once its replies pile up, and closed after the idle time."""
    name = "x" * 100_000
    message = json.dumps({"method": "hello.HelloWorld", "params": [name], "id": 1}).encode()
    sent, most, ended = 0, 0, False
    with served.connect() as connection:
        connection.settimeout(0.1)
        deadline = time.monotonic() + SECONDS
        while not ended and time.monotonic() < deadline and sent < 500 * MB:
            served.greet()
            try:
                sent += connection.send(message[sent % len(message) :])
            except TimeoutError:
                pass  # not read at the moment
            except (ConnectionResetError, BrokenPipeError):
                ended = True
            most = max(most, served.memory())
    assert ended
    assert most - served.before < 60 * MB
    served.assert_well(60)


@limited(connections=5)
def test_too_many_connections(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # and the steady one
            stack.enter_context(served.connect())
        with served.connect() as refused:
            assert replies(refused) == [
                {"id": None, "result": None, "error": "rpc: more than 5 connections; call again elsewhere"}
            ]
        served.greet()

    def let_in() -> bool:
        with served.connect() as connection:
            send(connection, VALID)
            return b'"id":1,' in connection.recv(1000)

    eventually("another is let in", let_in)
    served.assert_well(5)


@limited(idle=2)
def test_an_idle_connection_is_closed(served: Served) -> None:
    with served.connect() as connection:
        begun = time.monotonic()
        while time.monotonic() - begun < 3:  # one that is not idle stays
            send(connection, VALID)
            assert connection.recv(1000)
            served.greet()
        assert replies(connection) == []
        assert time.monotonic() - begun < 10


@limited(slow=0.5, idle=60)
def test_a_message_that_takes_too_long(served: Served) -> None:
    with served.connect() as connection:
        begun = time.monotonic()
        send(connection, VALID + VALID[:-1])
        first, last = replies(connection)
        assert first["id"] == 1
        assert last["id"] is None
        assert last["error"].endswith("expected a message to end within 0.5 s, found none that has")
        assert 0.4 < time.monotonic() - begun < 5
    served.greet()


@limited(slow=0.5, idle=60)
def test_dripping_does_not_help(served: Served) -> None:
    with served.connect() as connection:
        begun = time.monotonic()
        chance = random.Random(4)  # noqa: S311
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(b'{"method":"')
            while time.monotonic() - begun < SECONDS:
                connection.sendall(b"x")
                time.sleep(chance.uniform(0.01, 0.1))  # the sender's own slowness
        assert time.monotonic() - begun < 5
    served.greet()
