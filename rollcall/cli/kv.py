"""`kv`: settings that change while instances run, and which value is in force where."""

import http.client
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click

from rollcall.cli import show
from rollcall.live import ROOT
from rollcall.registry import Instance, Keys, Registry

P = ParamSpec("P")
R = TypeVar("R")

TIMEOUT = 2.0  # seconds that an instance has to answer
TAKEN_WITHIN = 5.0  # seconds in which instances take over what has been set
PAUSE = 0.1  # seconds between two looks
AT_ONCE = 16  # instances that are asked at the same time

Report = dict[str, Any]
"""What an instance tells at /settings, see `LiveSettings.report`; with `problem` in the place of it why it does not."""

service = click.argument("service", shell_complete=show.complete_service)
setting = click.argument("setting")
instance = click.option("--instance", default="", metavar="ID", help="For this instance alone.")


def pass_keys(command: Callable[Concatenate[Registry, Keys, P], R]) -> Callable[P, R]:
    """Give a command the registry, and the keys in it, as its first arguments."""

    @show.pass_registry
    @wraps(command)
    def wrapped(registry: Registry, /, *arguments: P.args, **named: P.kwargs) -> R:
        if not isinstance(registry, Keys):
            raise show.FoundError(f"{registry} keeps no settings: those of an instance are what it was started with")
        return command(registry, registry, *arguments, **named)

    return wrapped


@click.group()
def kv() -> None:
    """See and change settings while instances run.

    They are kept in Consul, under rollcall/SERVICE/SETTING for all instances of a service, and under
    rollcall/SERVICE/INSTANCE/SETTING for one, which comes first. Both come before what an instance was started with.
    SETTING is spelled as the instance's flag is: log-level.
    """


@kv.command()
@click.argument("service", required=False, shell_complete=show.complete_service)
@click.argument("setting", required=False)
@show.as_json
@show.pass_registry
def get(registry: Registry, service: str | None, setting: str | None, *, as_json: bool) -> None:
    """Show which value is in force where.

    And where it comes from: a key, or what the instance was started with. Of one service and setting, or of all. Exits
    with 1 when a value is refused, or an instance does not tell.
    """
    names = [show.known(registry, service)] if service else registry.services()
    reports = _reports(registry, names, strangers=bool(service))
    if setting:
        _known(setting, service or "", reports)
    _tell(reports, setting, as_json=as_json)
    if any(_refusals(reports, setting)) or any("problem" in each for each in reports):
        raise click.exceptions.Exit(show.NOT_WELL)


@kv.command(name="set")
@service
@setting
@click.argument("value")
@instance
@show.as_json
@pass_keys
def set_(
    registry: Registry, keys: Keys, service: str, setting: str, value: str, instance: str, *, as_json: bool
) -> None:
    """Change a setting of all instances, or of one.

    Waits until they have it. Exits with 1 when one refuses the value: it keeps the one it has.
    """
    reports = _told(registry, service, setting, instance)
    key = _key(service, setting, instance)
    keys.put(key, value)
    ids = [each["instance"] for each in reports]
    taken = _wait(registry, service, ids, lambda found: _follows(found, setting, key, value))
    _tell(taken, setting, as_json=as_json)
    if any(_refusals(taken, setting)):
        back = f"{service} {setting}" + (f" --instance {instance}" if instance else "")
        raise show.FoundError(f"what was in force stays: set another value, or: rollcall kv unset {back}")


@kv.command()
@service
@setting
@instance
@show.as_json
@pass_keys
def unset(registry: Registry, keys: Keys, service: str, setting: str, instance: str, *, as_json: bool) -> None:
    """Take back what was set.

    For all instances, or for one. What they were started with is in force again.
    """
    key = _key(service, setting, instance)
    there = keys.keys(key)
    if key not in there:
        listed = [each.removeprefix(f"{ROOT}{service}/") for each in keys.keys(f"{ROOT}{service}/")]
        raise show.unknown(f"setting of {service} in {registry}:", key.removeprefix(f"{ROOT}{service}/"), listed)
    keys.delete(key)
    ids = [each["instance"] for each in _reports(registry, [service]) if "problem" not in each]
    taken = _wait(registry, service, ids, lambda found: key not in (each["key"] for each in _entries(found)))
    _tell(taken, setting, as_json=as_json)


@kv.command()
@service
@show.as_json
@pass_keys
def watch(registry: Registry, keys: Keys, service: str, *, as_json: bool) -> None:  # noqa: ARG001
    """Follow the keys of a service.

    Prints what there is, then each change, until interrupted. With --json, all of them again on a line for each change.
    """
    before: dict[str, str] = {}
    with closing(keys.watch_keys(f"{ROOT}{service}/")) as changes:
        for now in changes:
            if as_json:
                show.document(now)
            elif not before and not now:
                click.echo("no key yet")
            else:
                for key in sorted(before.keys() | now.keys()):
                    if key not in now:
                        click.echo(f"- {key}")
                    elif before.get(key) != now[key]:
                        click.echo(f"{'~' if key in before else '+'} {key}  {now[key]}")
            before = now


def _key(service: str, setting: str, instance: str) -> str:
    return f"{ROOT}{service}/{instance}/{setting}" if instance else f"{ROOT}{service}/{setting}"


def _told(registry: Registry, service: str, setting: str, instance: str) -> list[Report]:
    """Return what the instances that a change is for tell. Raises `FoundError` where there is nobody, or no setting."""
    reports = _reports(registry, [show.known(registry, service)])
    if instance and instance not in (each["instance"] for each in reports):
        raise show.unknown(f"instance of {service}", instance, [each["instance"] for each in reports])
    telling = [each for each in reports if "problem" not in each and instance in ("", each["instance"])]
    if not telling:
        raise show.FoundError(f"nobody to ask whether {service} has a setting {setting!r}: " + _problems(reports))
    _known(setting, service, telling)
    return telling


def _problems(reports: Iterable[Report]) -> str:
    return "; ".join(f"{each['instance']}: {each['problem']}" for each in reports if "problem" in each) or "no instance"


def _known(setting: str, service: str, reports: Sequence[Report]) -> None:
    names = sorted({each["name"] for report in reports for each in report.get("settings", ())})
    if setting not in names:
        raise show.unknown(f"setting{f' of {service}' * bool(service)} that can change while it runs:", setting, names)


def _reports(registry: Registry, names: Iterable[str], *, strangers: bool = True) -> list[Report]:
    """Ask all instances of these services; those that are none of Rollcall's only to say so.

    Another datacenter's follow the keys of that.
    """
    listing = show.Listing(registry)
    own = [each for name in names for each in listing(name) if not each.priority]
    instances = [each for each in own if strangers or show.has_probes(each)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_report, instances))


def _report(instance: Instance) -> Report:
    if not show.has_probes(instance):
        problem = "does not tell its settings: it is none of Rollcall's"
        return {"service": instance.name, "instance": instance.id, "problem": problem}
    connection = http.client.HTTPConnection(instance.address, int(instance.meta["http_port"]), timeout=TIMEOUT)
    try:
        connection.request("GET", "/settings")
        answer = connection.getresponse()
        found: Report = json.loads(answer.read())
        problem = "" if found["instance"] == instance.id else f"it is {found['instance']} that answers there"
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        problem = str(error)
    finally:
        connection.close()
    if problem:
        return {"service": instance.name, "instance": instance.id, "problem": f"does not tell its settings: {problem}"}
    return found


def _wait(registry: Registry, service: str, ids: Sequence[str], done: Callable[[Report], bool]) -> list[Report]:
    """Wait until something holds of what each of these instances tells, and return that."""
    deadline = time.monotonic() + TAKEN_WITHIN
    while True:
        found = [each for each in _reports(registry, [service]) if each["instance"] in ids]
        taken = {each["instance"] for each in found if "problem" not in each and done(each)}
        late = [each for each in ids if each not in taken]
        if not late:
            return found
        if time.monotonic() > deadline:
            who = f"{', '.join(late)} did not take it over within {TAKEN_WITHIN:g} s"
            raise show.FoundError(f"written, but {who}: see rollcall kv get {service}, and rollcall doctor")
        time.sleep(PAUSE)


def _entries(report: Report, setting: str | None = None) -> list[dict[str, Any]]:
    return [*_of(report, setting), *report.get("unknown", ())]


def _of(report: Report, setting: str | None) -> list[dict[str, Any]]:
    return [each for each in report.get("settings", ()) if setting in (None, each["name"])]


def _follows(report: Report, setting: str, key: str, value: str) -> bool:
    """Say whether an instance has heard of a value, or has a key of its own that comes before it."""
    (found,) = _of(report, setting) or ({"key": key, "text": value},)
    own = found["key"].count("/") > key.count("/")
    return own or (found["key"], found["text"]) == (key, value)


def _refusals(reports: Iterable[Report], setting: str | None) -> Iterable[str]:
    same: dict[tuple[str, str, str], list[str]] = {}
    for report in reports:
        for each in _entries(report, setting):
            if each["refused"]:
                same.setdefault((each["text"], each["key"], each["refused"]), []).append(report["instance"])
    for (text, key, why), ids in same.items():
        yield f"{text!r} of {key} by {', '.join(ids)}: {why}"


def _tell(reports: Sequence[Report], setting: str | None, *, as_json: bool) -> None:
    if as_json:
        show.document([{**each, "settings": _of(each, setting)} for each in reports])
    else:
        _show(reports, setting)


def _show(reports: Sequence[Report], setting: str | None) -> None:
    """Print which value is in force where: instances with the same stand on one line."""
    same: dict[tuple[str, str, str, str], list[str]] = {}
    for report in reports:
        for each in _of(report, setting):
            line = (report["service"], each["name"], str(each["value"]), each["source"])
            same.setdefault(line, []).append(report["instance"])
    rows = [(*line, ", ".join(ids)) for line, ids in sorted(same.items(), key=lambda each: each[0][:2])]
    if rows:
        show.table(("SERVICE", "SETTING", "VALUE", "FROM", "INSTANCES"), rows)
    for refusal in _refusals(reports, setting):
        click.echo(f"{click.style('refused', fg='red')}  {refusal}")
    for report in reports:
        if "problem" in report:
            click.echo(f"{click.style('problem', fg='red')}  {report['instance']} {report['problem']}")
