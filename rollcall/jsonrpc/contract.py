"""`Contract`: what a server and its clients agree on, written as a Protocol class.

Its methods follow the rule of Go's net/rpc: each takes one value and returns one. Values are whatever pydantic can turn
into JSON and back: strings, numbers, lists, dataclasses, models.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import JsonSchemaMode
from pydantic_core import PydanticSerializationError, to_json

from rollcall.jsonrpc.wire import shortened

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

_IDEMPOTENT = "__rollcall_idempotent__"


def idempotent(function: Function) -> Function:
    """Mark a method of a contract: a call that may have reached a server already may be made again."""
    setattr(function, _IDEMPOTENT, True)
    return function


@dataclass(frozen=True)
class Described:
    """A method as its server describes it: see `rollcall.jsonrpc.discover`."""

    name: str
    """Without its service: `HelloWorld`."""
    service: str
    """The name of its contract: `hello`."""
    doc: str
    idempotent: bool
    """Whether a call that may have reached a server already may be made again."""
    parameter: dict[str, Any]
    """The JSON Schema (2020-12) of the one value that it takes; what it refers to is in its `$defs`."""
    result: dict[str, Any]
    """The same of the value that it returns."""


class Contract(Generic[T]):
    """The methods that can be called under a name.

        class Hello(Protocol):
            async def HelloWorld(self, name: str, /) -> str: ...

        HELLO = jsonrpc.Contract("hello", Hello)

    The protocol is looked at once, here. Raises TypeError saying which of its methods cannot be called, and why.
    """

    def __init__(self, name: str, protocol: Callable[..., T]) -> None:
        if not name:
            raise ValueError("expected the name of a service, found an empty string")
        self.name = name
        methods = [Method(name, *each) for each in inspect.getmembers(protocol, inspect.isfunction) if _public(*each)]
        if not methods:
            raise TypeError(f"{protocol!r}: expected a class with methods to call, found none")
        self.methods = {method.name: method for method in methods}

    @classmethod
    def described(cls, name: str, methods: Iterable[Described]) -> "Contract[Any]":
        """Return a contract of methods that a server has described, to call them with any JSON values.

            async with jsonrpc.dial(jsonrpc.Contract.described("hello", said)) as hello:
                print(await hello.HelloWorld("李白"))

        Each goes by its own name and by SERVICE.NAME, and by the latter alone where two services have one of that name.
        Raises ValueError when there are none.
        """
        methods = list(methods)
        if not (name and methods):
            raise ValueError(f"expected a name, and methods to call; found {name!r} and {len(methods)} methods")
        contract: Contract[Any] = cls.__new__(cls)
        contract.name, contract.methods = name, {}
        namesakes = Counter(each.name for each in methods)
        for each in methods:
            method = Method(each.service, each.name, _taking_anything(each))
            contract.methods[method.path] = method
            if namesakes[each.name] == 1:
                contract.methods[each.name] = method
        return contract

    def differences(self, handler: object) -> list[str]:
        """Say in what an object differs from what the contract asks of a handler; in nothing: an empty list."""
        return [difference for method in self.methods.values() for difference in method.differences(handler)]


class Method:
    """One method of a contract."""

    def __init__(self, service: str, name: str, function: Callable[..., Any]) -> None:
        self.service, self.name = service, name
        self.path = f"{service}.{name}"
        """What requests call it: Go's net/rpc separates the service from the method by the last dot."""
        self.doc = inspect.getdoc(function) or ""
        self.idempotent = hasattr(function, _IDEMPOTENT)
        _, *parameters = inspect.signature(function).parameters.values()
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{self.path}: expected `async def`, found `def`")
        # By name it could not be called: a request carries values alone.
        if [each.kind for each in parameters] != [inspect.Parameter.POSITIONAL_ONLY]:
            raise TypeError(
                f"{self.path}: expected one positional-only parameter after self, as in (self, name: str, /), "
                f"found {inspect.signature(function)}"
            )
        try:
            hints = get_type_hints(function)
        except NameError as error:
            raise TypeError(f"{self.path}: expected annotations that can be resolved at run time: {error}") from None
        for wanted in (parameters[0].name, "return"):
            if wanted not in hints:
                raise TypeError(f"{self.path}: expected an annotation of {wanted!r}, found none")
        self.parameter_name = parameters[0].name
        try:
            self.parameter, self.result = Value(hints[parameters[0].name]), Value(hints["return"])
        except PydanticUserError as error:
            raise TypeError(f"{self.path}: expected types that JSON can carry: {error}") from None
        self._request = b'{"method":%b,"params":[' % to_json(self.path)

    def request(self, argument: Any) -> bytes:
        """Return a request up to its id. Raises TypeError for an argument that is not what the contract says."""
        try:
            return self._request + self.parameter.encode(argument)
        except BadValueError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def differences(self, handler: object) -> Iterator[str]:
        """Say in what an object's method of this name differs from this one."""
        function = getattr(handler, self.name, None)
        if not callable(function):
            yield f"{self.name} is missing"
            return
        if not inspect.iscoroutinefunction(function):
            yield f"{self.name} is not `async def`"
        parameters = list(inspect.signature(function).parameters.values())
        if not _takes_one(parameters):
            yield f"{self.name} takes {inspect.signature(function)}, not one positional argument"
            return
        try:
            hints = get_type_hints(function)
        except NameError as error:  # imported for type checkers only, say
            yield f"{self.name} has an annotation that cannot be resolved at run time: {error}"
            return
        takes, returns = hints.get(parameters[0].name, Any), hints.get("return", Any)
        if not _stands_for(self.parameter.type, takes):
            yield f"{self.name} takes {_name(takes)}, not {self.parameter}"
        if not _stands_for(returns, self.result.type):
            yield f"{self.name} returns {_name(returns)}, not {self.result}"


class BadValueError(ValueError):
    """A value is not of the type that a contract asks for. The message says what is, without repeating the value."""


class Value:
    """A type of values that travel."""

    def __init__(self, type_: Any) -> None:
        self.type = type_
        adapter = self._adapter = TypeAdapter[Any](type_)
        self._to_json = adapter.serializer.to_json
        self._from_json = adapter.validator.validate_json
        self._check = adapter.validator.validate_python
        self._plain = type_ in (str, int, float, bool, type(None))

    def __str__(self) -> str:
        return _name(self.type)

    def schema(self, mode: JsonSchemaMode) -> dict[str, Any]:
        """Return the JSON Schema of what is taken ("validation") or given ("serialization"): {} where there is none."""
        try:
            return self._adapter.json_schema(mode=mode)
        except PydanticUserError:  # a type that is checked by code alone
            return {}

    def encode(self, value: Any) -> bytes:
        """Return a value as JSON. Raises `BadValueError` for one that is not of the type."""
        try:
            return self._to_json(value, warnings="error")
        except PydanticSerializationError:
            raise BadValueError(f"expected {self}, found {_name(type(value))}") from None

    def decode(self, value: Any) -> Any:
        """Return the value of this type that parsed JSON stands for. Raises `BadValueError` if it is of another."""
        try:
            if self._plain:
                return self._check(value, strict=True)
            if self.type is Any:
                return value
            # What JSON can say of a dataclass, a date or a tuple, pydantic takes in strict mode from JSON only.
            return self._from_json(to_json(value), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            found = _JSON_NAMES.get(type(first["input"]), "something else")
            where = "".join(f"[{part!r}]" for part in first["loc"])
            problem = shortened(f": {first['msg']}, at {where}") if where else ""
            raise BadValueError(f"expected {self}, found {found}{problem}") from None


_JSON_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def _taking_anything(described: Described) -> Callable[..., Any]:
    """Return a function that stands in a contract for a method that was described."""

    async def function(_: object, value: Any, /) -> Any:
        """Never be called: only what it says of itself is looked at."""

    function.__doc__ = described.doc
    return idempotent(function) if described.idempotent else function


def _public(name: str, _: object) -> bool:
    return not name.startswith("_")


def _takes_one(parameters: list[inspect.Parameter]) -> bool:
    """Say whether a function with these parameters can be called with one positional argument, and nothing else."""
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return False
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(other.default is not inspect.Parameter.empty or other.kind in variable for other in parameters[1:])


def _stands_for(special: Any, general: Any) -> bool:
    """Say whether each value of a type is one of another, as far as can be told here. mypy can tell more."""
    if special == general or Any in (special, general):
        return True
    return inspect.isclass(special) and inspect.isclass(general) and issubclass(special, general)


def _name(type_: Any) -> str:
    return type_.__qualname__ if inspect.isclass(type_) and not hasattr(type_, "__origin__") else str(type_)
