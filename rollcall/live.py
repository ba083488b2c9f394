"""Settings that change while an instance runs, by keys in the registry.

`rollcall/SERVICE/SETTING` is for all instances of a service, `rollcall/SERVICE/INSTANCE/SETTING` for one of them and
comes before it; both come before what was set at the start, by flag, environment or default. SETTING is spelled as the
flag is: `log-level`. What can be changed are the fields marked as `LIVE`, of the service's own settings and of
`CallSettings`: of how its calls to others are treated, where its code does not say so itself.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Gauge
from pydantic_settings import BaseSettings

from rollcall import logs
from rollcall.policy import configure
from rollcall.registry import Keys, Registry
from rollcall.settings import CallSettings, ServiceSettings, live, load, parse, source

log = logging.getLogger(__name__)

ROOT = "rollcall/"
UNKNOWN = 20
"""Most keys that no setting belongs to of which one instance tells."""


@dataclass
class _Setting:
    """A setting that can be changed, and what is in force."""

    name: str
    kinds: tuple[type[BaseSettings], ...]
    """The kinds of settings that have it."""
    at_start: tuple[Any, str]
    """The value that it began with, and where that comes from."""
    value: Any = None
    source: str = ""
    key: str = ""
    """The key in the registry that it is to follow, if there is one."""
    text: str = ""
    """What is under that."""
    refused: str = ""
    """Why it does not."""

    def follow(self, key: str, text: str) -> bool:
        """Take over what is under a key, an empty one for none; say whether the value has become another."""
        before = self.value
        self.key, self.text, self.refused = key, text, ""
        try:
            self.value, self.source = (self._parse(text), key) if key else self.at_start
        except ValueError as error:
            self.refused = str(error)
        return bool(self.value != before)

    def _parse(self, text: str) -> Any:
        values = [parse(kind, _field(self.name), text) for kind in self.kinds]  # it has to fit each of them
        return values[0]


@dataclass
class _Refusals:
    """What is refused at the moment: said once, and shown as a metric."""

    metric: Gauge
    now: dict[tuple[str, str], str] = field(default_factory=dict)

    def become(self, found: dict[tuple[str, str], tuple[str, str]]) -> None:
        """Take over what is refused: by key and text the setting's name, and why."""
        for (key, text), (name, why) in found.items():
            if (key, text) not in self.now:
                log.warning("%s is refused, %r: %s; the last good value stays", key, text, why)
            self.metric.labels(name).set(1)
        for name in set(self.now.values()) - {name for name, _ in found.values()}:
            self.metric.remove(name)
        self.now = {each: name for each, (name, _) in found.items()}


class LiveSettings:
    """The settings of one instance that can be changed while it runs.

    `settings` are the instance's own, whose fields change in place. `refused` is the metric that tells of values that
    cannot be.
    """

    def __init__(self, service: str, instance: str, settings: ServiceSettings, refused: Gauge) -> None:
        self._service, self._instance = service, instance
        self._own = settings
        self._refusals = _Refusals(refused)
        self._lock = threading.Lock()
        self._unknown: dict[str, tuple[str, str]] = {}
        self._settings: dict[str, _Setting] = {}
        calls = load(CallSettings)
        for each in (settings, calls):
            for name in live(type(each)):
                at_start = (getattr(each, name), source(each, name))
                known = self._settings.get(_spelled(name)) or _Setting(_spelled(name), (), at_start, *at_start)
                known.kinds += (type(each),)
                self._settings[known.name] = known

    @contextmanager
    def following(self, registry: Registry) -> Iterator[None]:
        """Follow the keys in a registry that has any, for as long as the block lasts."""
        if not isinstance(registry, Keys):
            yield
            return
        with closing(registry.watch_keys(f"{ROOT}{self._service}/")) as watch:

            def follow() -> None:
                for keys in watch:
                    try:
                        self._take(keys)
                    except Exception:  # whatever it is, a watch that ended here would leave the instance in the past
                        log.exception("the settings in %s could not be taken over", registry)

            threading.Thread(target=follow, name="live settings", daemon=True).start()
            yield

    def report(self) -> dict[str, Any]:
        """Return which value is in force, and where it comes from, setting by setting; and what is refused."""
        with self._lock:
            return {
                "service": self._service,
                "instance": self._instance,
                "settings": [
                    {
                        "name": each.name,
                        "value": each.value,
                        "source": each.source,
                        "key": each.key,
                        "text": each.text,
                        "refused": each.refused,
                    }
                    for each in self._settings.values()
                ],
                "unknown": [{"key": key, "text": text, "refused": why} for key, (text, why) in self._unknown.items()],
            }

    def _take(self, keys: Mapping[str, str]) -> None:
        """Have what is under these keys be in force."""
        chosen: dict[str, tuple[str, str]] = {}
        for prefix in (f"{ROOT}{self._service}/", f"{ROOT}{self._service}/{self._instance}/"):  # the latter wins
            for key, text in keys.items():
                name = key.removeprefix(prefix)
                if name and name != key and "/" not in name:
                    chosen[name] = (key, text)
        with self._lock:
            changed = [each for each in self._settings.values() if each.follow(*chosen.get(each.name, ("", "")))]
            for each in changed:
                log.info("%s is %s now, by %s", each.name, each.value, each.source)
                if type(self._own) in each.kinds:
                    object.__setattr__(self._own, _field(each.name), each.value)  # frozen to all others
            self._unknown = {
                key: (text, f"expected one of {', '.join(sorted(self._settings))}")
                for name, (key, text) in sorted(chosen.items())[:UNKNOWN]
                if name not in self._settings
            }
            bad = [each for each in self._settings.values() if each.refused]
            refused = {(each.key, each.text): (each.name, each.refused) for each in bad}
            refused |= {(key, text): (key.rpartition("/")[2], why) for key, (text, why) in self._unknown.items()}
            self._refusals.become(refused)
            calls = {
                _field(each.name): each.value
                for each in self._settings.values()
                if CallSettings in each.kinds and each.source.startswith(ROOT)
            }
        if any(each.name == "log-level" for each in changed):
            logs.set_level(self._own.log_level)
        configure(calls)


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _field(name: str) -> str:
    return name.replace("-", "_")
