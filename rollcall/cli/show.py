"""How the command speaks: tables for people, JSON for programs, and what has gone wrong in words."""

import functools
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from rollcall.registry import Instance, Registry, RegistryError, RegistryUnavailableError
from rollcall.settings import BadSettingError, RegistrySettings, load

P = ParamSpec("P")
R = TypeVar("R")

NOT_WELL = 1
TYPED_WRONGLY = 2
UNAVAILABLE = 3
CALL = 64
"""What the exit code of a call that fails begins from, as grpcurl's does: its status' own is added."""
INTERRUPTED = 130

NAMED = 10  # most names that an error lists


def pass_registry(command: Callable[Concatenate[Registry, P], R]) -> Callable[P, R]:
    """Give a command the registry as its first argument."""

    @functools.wraps(command)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        return command(registry(click.get_current_context()), *arguments, **named)

    return wrapped


as_json = click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")


class FoundError(Exception):
    """The command has not done what it should, and says why; `code` is what it exits with."""

    def __init__(self, text: str, code: int = NOT_WELL) -> None:
        super().__init__(text)
        self.code = code


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below their header, columns side by side. Cells may have colours."""
    lines = [header, *rows]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _width(cell: str) -> int:
    """Return how many columns of a terminal a text takes: 李 takes two, and a colour none."""
    return sum(1 + (unicodedata.east_asian_width(each) in "FW") for each in click.unstyle(cell))


def document(value: Any) -> None:
    """Print JSON for a program, on a line of its own."""
    click.echo(json.dumps(value, ensure_ascii=False))


def state(*, good: bool, text: str) -> str:
    """Return how something is, in the colour of that."""
    return click.style(text, fg="green" if good else "red")


def check(instance: Instance) -> str:
    """Return what an instance's check says, in the colour of that."""
    return state(good=instance.passing, text="passing" if instance.passing else "failing")


def unknown(what: str, name: str, there: Iterable[str]) -> FoundError:
    """Return the error that there is nothing of this name, with what may have been meant."""
    known = list(there)
    if close := get_close_matches(name, known, n=1):
        return FoundError(f"no {what} {name!r}; did you mean {close[0]!r}?")
    listed = ", ".join(known[:NAMED]) + (", ..." if len(known) > NAMED else "")
    return FoundError(f"no {what} {name!r}; there are: {listed or 'none'}")


def known(there: Registry, name: str) -> str:
    """Return the name of a service. Raises `FoundError` when nothing is registered under it."""
    names = there.services()
    if name not in names:
        raise unknown("service", name, names)
    return name


def registry(context: click.Context) -> Registry:
    """Return the registry that the command was told of, or that the environment describes. Raises `BadSettingError`."""
    consul = context.find_root().params.get("consul")
    return load(RegistrySettings, overrides={} if consul is None else {"consul": consul}).open_registry()


class Listing:
    """The instances as the registry as a whole holds them; where it cannot say, as one of its servers does."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._old = ""

    def __call__(self, name: str, tag: str = "") -> tuple[Instance, ...]:
        """Return all instances of a service. Raises `RegistryError` when nobody can be asked at all."""
        if not self._old:
            try:
                return self._registry.instances(name, tag, failing=True, certain=True)
            except RegistryUnavailableError as error:
                self._old = str(error)
        found = self._registry.instances(name, tag, failing=True)
        click.echo(f"{name}: this may be old: {self._old}", err=True)
        return found


def has_probes(instance: Instance) -> bool:
    """Say whether an instance tells at which port its probes are, and its settings: Rollcall's do."""
    return instance.meta.get("http_port", "").isdecimal()


def complete_service(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """Return the names of services that begin like this, for a shell; none when the registry does not answer."""
    try:
        return [each for each in registry(context).services() if each.startswith(begun)]
    except (RegistryError, BadSettingError):
        return []
