"""Contracts: what can be called, and what is refused as not keeping to it, by mypy and at run time."""

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from pydantic import BaseModel

from contracts.hello.v1.hello import HELLO, Hello
from rollcall import jsonrpc
from rollcall.jsonrpc.contract import BadValueError, Value
from services.hello.handler import Hello as Handler

if TYPE_CHECKING:
    from datetime import datetime

ROOT = Path(__file__).parents[2]


def test_what_a_contract_says() -> None:
    assert HELLO.name == "hello"
    method = HELLO.methods["HelloWorld"]
    assert (method.path, method.idempotent) == ("hello.HelloWorld", True)
    assert method.request("李白") == '{"method":"hello.HelloWorld","params":["李白"]'.removesuffix("]").encode()


class NotAsync(Protocol):
    def Do(self, name: str, /) -> str: ...


class TooMany(Protocol):
    async def Do(self, name: str, age: int, /) -> str: ...


class TooFew(Protocol):
    async def Do(self) -> str: ...


class KeywordOnly(Protocol):
    async def Do(self, *, name: str) -> str: ...


class ByName(Protocol):
    async def Do(self, name: str) -> str: ...


class Unresolved(Protocol):
    async def Do(self, when: "datetime", /) -> str: ...


class NoType(Protocol):
    async def Do(self, name, /) -> str: ...  # type: ignore[no-untyped-def]  # noqa: ANN001


class NoResult(Protocol):
    async def Do(self, name: str, /): ...  # type: ignore[no-untyped-def]  # noqa: ANN201


class NoJson(Protocol):
    async def Do(self, name: str, /) -> "subprocess.Popen[bytes]": ...


class Empty(Protocol):
    pass


@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        (NotAsync, "trial.Do: expected `async def`, found `def`"),
        (TooMany, "trial.Do: expected one positional-only parameter after self, as in (self, name: str, /), found ("),
        (TooFew, "trial.Do: expected one positional-only parameter after self"),
        (KeywordOnly, "trial.Do: expected one positional-only parameter after self"),
        (ByName, "/), found (self, name: str) -> str"),
        (Unresolved, "trial.Do: expected annotations that can be resolved at run time: name 'datetime' is not"),
        (NoType, "trial.Do: expected an annotation of 'name', found none"),
        (NoResult, "trial.Do: expected an annotation of 'return', found none"),
        (NoJson, "trial.Do: expected types that JSON can carry"),
        (Empty, "expected a class with methods to call, found none"),
    ],
)
def test_what_cannot_be_called_is_refused(protocol: Any, says: str) -> None:
    with pytest.raises(TypeError) as caught:
        jsonrpc.Contract("trial", protocol)
    assert says in str(caught.value)


def test_a_contract_needs_a_name() -> None:
    with pytest.raises(ValueError, match="expected the name of a service"):
        jsonrpc.Contract("", Hello)


class Two(Protocol):
    async def Add(self, numbers: list[int], /) -> int: ...

    async def Greet(self, name: str, /) -> str: ...


TWO = jsonrpc.Contract("two", Two)


class Good:
    async def Add(self, numbers: list[int], more: int = 0) -> int:
        return sum(numbers) + more

    async def Greet(self, name: object) -> str:
        return str(name)


class Untyped:
    async def Add(self, numbers):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return sum(numbers)

    async def Greet(self, name):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        return name


@pytest.mark.parametrize("handler", [Good(), Untyped()])
def test_a_handler_that_keeps_to_the_contract(handler: Any) -> None:
    jsonrpc.Server().register(TWO, handler)


class Other:
    async def Add(self, numbers: list[str]) -> str:
        return "".join(numbers)

    def Greet(self, name: str) -> str:
        return name


class Hidden:
    """Has an annotation that only type checkers know."""

    async def Add(self, numbers: list[int]) -> "datetime": ...  # type: ignore[empty-body]

    async def Greet(self, name: str) -> str:
        return name


class Fewer:
    async def Add(self, numbers: list[int], more: int) -> int:
        return sum(numbers) + more


def test_a_handler_that_does_not_is_refused_with_all_that_differs() -> None:
    with pytest.raises(TypeError) as caught:
        jsonrpc.Server().register(TWO, Other())  # type: ignore[misc]
    for difference in (
        "expected a handler of 'two', found <",
        "Add takes list[str], not list[int]",
        "Add returns str, not int",
        "Greet is not `async def`",
    ):
        assert difference in str(caught.value)
    with pytest.raises(TypeError, match="Add has an annotation that cannot be resolved at run time: name 'datetime'"):
        jsonrpc.Server().register(TWO, Hidden())  # type: ignore[misc]
    with pytest.raises(TypeError) as caught:
        jsonrpc.Server().register(TWO, Fewer())  # type: ignore[misc]
    assert "Add takes (numbers: list[int], more: int) -> int, not one positional argument; Greet is missing" in str(
        caught.value
    )


def test_a_name_is_registered_once() -> None:
    server = jsonrpc.Server()
    server.register(HELLO, Handler())
    with pytest.raises(ValueError, match="expected one handler of 'hello', found a second one"):
        server.register(HELLO, Handler())


@dataclass
class Day:
    date: date
    tags: tuple[str, ...]


class Person(BaseModel):
    name: str
    days: list[Day]


@pytest.mark.parametrize(
    ("type_", "value", "encoded"),
    [
        (str, "李白", '"李白"'),
        (int, 10**30, str(10**30)),
        (float, 1.5, "1.5"),
        (bool, True, "true"),
        (type(None), None, "null"),
        (list[int], [1, 2], "[1,2]"),
        (dict[str, list[bool]], {"a": [True]}, '{"a":[true]}'),
        (Day, Day(date(2026, 1, 31), ("a",)), '{"date":"2026-01-31","tags":["a"]}'),
        (Person, Person(name="x", days=[]), '{"name":"x","days":[]}'),
        (str | None, None, "null"),
    ],
)
def test_values_travel(type_: Any, value: Any, encoded: str) -> None:
    assert Value(type_).encode(value).decode() == encoded
    assert Value(type_).decode(json.loads(encoded)) == value


@pytest.mark.parametrize(
    ("type_", "value", "says"),
    [
        (str, 5, "expected str, found a number"),
        (int, "5", "expected int, found a string"),
        (int, True, "expected int, found a boolean"),
        (list[int], [1, None], "expected list[int], found null: Input should be a valid integer, at [1]"),
        (Person, {"name": "x"}, "expected Person, found an object: Field required, at ['days']"),
        (Person, {"name": "x", "days": [{"date": 1}]}, "at ['days'][0]['date']"),
        (dict[str, int], {"y" * 10_000: "z"}, "expected dict[str, int], found a string: "),
    ],
)
def test_values_of_another_type_are_refused_without_repeating_them(type_: Any, value: Any, says: str) -> None:
    with pytest.raises(BadValueError) as caught:
        Value(type_).decode(value)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("type_", "value"), [(str, 5), (int, "x"), (list[int], "x"), (Person, {"name": 1}), (str, "\ud800")]
)
def test_values_of_another_type_are_not_sent(type_: Any, value: Any) -> None:
    with pytest.raises(BadValueError, match=r"^expected "):
        Value(type_).encode(value)


# What mypy says, of programs that would fail when they run.
BEGINNING = """
from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc
"""
RIGHT = f"""{BEGINNING}
class Handler:
    async def HelloWorld(self, name: str, /) -> str:
        return name


async def call() -> str:
    jsonrpc.Server().register(HELLO, Handler())
    jsonrpc.Service("hello").register(HELLO, Handler())
    async with jsonrpc.connect("127.0.0.1:1", HELLO) as hello, jsonrpc.dial(HELLO, tag="new") as found:
        return await hello.HelloWorld("x") + await found.HelloWorld("x")
"""
WRONG_HANDLER = f"""{BEGINNING}
class Handler:
    async def HelloWorld(self, name: int, /) -> str:
        return str(name)


jsonrpc.Server().register(HELLO, Handler())
jsonrpc.Service("hello").register(HELLO, Handler())
"""
WRONG_CALLS = f"""{BEGINNING}
async def call() -> None:
    async with jsonrpc.connect("127.0.0.1:1", HELLO) as hello, jsonrpc.dial(HELLO) as found:
        await hello.HelloWorld(5)
        await found.HelloWorld(5)
        await found.HelloMoon("x")
        length: int = await found.HelloWorld("x")
"""


def test_mypy_refuses_what_does_not_keep_to_the_contract(tmp_path: Path) -> None:
    for name, program in (("right", RIGHT), ("handler", WRONG_HANDLER), ("calls", WRONG_CALLS)):
        (tmp_path / f"{name}.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *sorted(tmp_path.glob("*.py"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    said = [line.partition(": error: ") for line in ran.stdout.splitlines() if ": error: " in line]
    found = [(Path(where.rpartition(":")[0]).stem, text) for where, _, text in said]
    assert not [text for name, text in found if name == "right"], ran.stdout
    of_handler = [text for name, text in found if name == "handler"]
    assert [text.partition('"register" ')[2] for text in of_handler] == [
        'of "Server"  [misc]',
        'of "Service"  [misc]',
    ], ran.stdout
    of_calls = [text for name, text in found if name == "calls"]
    assert of_calls == [
        'Argument 1 to "HelloWorld" of "Hello" has incompatible type "int"; expected "str"  [arg-type]',
        'Argument 1 to "HelloWorld" of "Hello" has incompatible type "int"; expected "str"  [arg-type]',
        '"Hello" has no attribute "HelloMoon"  [attr-defined]',
        'Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]',
    ], ran.stdout
