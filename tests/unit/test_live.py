"""Settings that change while an instance runs: which value is in force, and what becomes of one that cannot be."""

import logging
from collections.abc import Iterator
from typing import Annotated, Any, Self

import pytest
from prometheus_client import CollectorRegistry, Gauge
from pydantic import Field

from rollcall.live import LiveSettings
from rollcall.policy import Policy, configure
from rollcall.registry.memory import MemoryRegistry
from rollcall.settings import LIVE, ServiceSettings, load
from tests.waiting import eventually


class Settings(ServiceSettings):
    """With a limit of its own, and a deadline as `CallSettings` has one, but no longer than ten seconds."""

    most: Annotated[int, Field(ge=1), LIVE] = 7
    deadline: Annotated[float, Field(gt=0, le=10), LIVE] = 5.0
    fixed: int = 1


class Instance:
    """The settings of one instance, that follow a registry."""

    def __init__(self, registry: MemoryRegistry, *argv: str, name: str = "shop-1") -> None:
        self.settings = load(Settings, argv)
        self.metrics = CollectorRegistry()
        refused = Gauge("refused", "Refused.", ("setting",), registry=self.metrics)
        self.live = LiveSettings("shop", name, self.settings, refused)
        self._following = self.live.following(registry)

    def __enter__(self) -> Self:
        self._following.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._following.__exit__(None, None, None)

    def told(self, name: str) -> dict[str, Any]:
        (found,) = [each for each in self.live.report()["settings"] if each["name"] == name]
        return {key: value for key, value in found.items() if key != "name"}

    def becomes(self, name: str, value: object, source: str) -> None:
        def there() -> bool:
            told = self.told(name)
            return (told["value"], told["source"]) == (value, source)

        eventually(f"{name} is {value}, by {source}", there)

    def refuses(self, setting: str) -> bool:
        return self.metrics.get_sample_value("refused", {"setting": setting}) == 1


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("DEADLINE", "RETRIES", "MOST", "LOG_LEVEL", "GRACE", "DRAIN"):
        monkeypatch.delenv(f"ROLLCALL_{name}", raising=False)
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    configure({})


@pytest.fixture
def registry() -> MemoryRegistry:
    return MemoryRegistry()


def test_one_key_is_for_all_and_another_for_one_which_comes_first(registry: MemoryRegistry) -> None:
    with Instance(registry) as one, Instance(registry, name="shop-2") as other:
        registry.put("rollcall/shop/most", "9")
        for each in (one, other):
            each.becomes("most", 9, "rollcall/shop/most")
            assert each.settings.most == 9, "its owner reads it where it always has"
        registry.put("rollcall/shop/shop-1/most", "11")
        one.becomes("most", 11, "rollcall/shop/shop-1/most")
        assert other.settings.most == 9
        registry.delete("rollcall/shop/most")
        other.becomes("most", 7, "default")
        assert one.settings.most == 11
        registry.delete("rollcall/shop/shop-1/most")
        one.becomes("most", 7, "default")


def test_keys_that_were_there_before_it_are_in_force(registry: MemoryRegistry) -> None:
    registry.put("rollcall/shop/most", "9")
    with Instance(registry) as one:
        one.becomes("most", 9, "rollcall/shop/most")


def test_where_a_value_comes_from(registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLCALL_GRACE", "3")
    monkeypatch.setenv("ROLLCALL_DRAIN", "3")
    with Instance(registry, "--drain", "4") as one:
        assert [one.told(name)["source"] for name in ("grace", "drain", "most")] == ["environment", "flag", "default"]
        registry.put("rollcall/shop/drain", "5")
        one.becomes("drain", 5.0, "rollcall/shop/drain")
        registry.delete("rollcall/shop/drain")
        one.becomes("drain", 4.0, "flag")


@pytest.mark.parametrize("bad", ["0", "many", "", "1e9x"])
def test_a_bad_value_is_refused_and_the_last_good_one_stays(
    registry: MemoryRegistry, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    with Instance(registry) as one:
        registry.put("rollcall/shop/most", "9")
        one.becomes("most", 9, "rollcall/shop/most")
        registry.put("rollcall/shop/most", bad)
        eventually("it is refused", lambda: one.refuses("most"))
        told = one.told("most")
        assert (told["value"], told["text"], told["key"]) == (9, bad, "rollcall/shop/most")
        assert told["refused"]
        assert one.settings.most == 9
        registry.put("rollcall/shop/grace", "1")  # something else changes: it is not said again
        one.becomes("grace", 1.0, "rollcall/shop/grace")
        assert caplog.text.count("rollcall/shop/most is refused") == 1
        registry.put("rollcall/shop/most", "10")
        one.becomes("most", 10, "rollcall/shop/most")
        eventually("the metric is gone", lambda: not one.refuses("most"))
        registry.put("rollcall/shop/most", bad)
        eventually("it is refused again", lambda: one.refuses("most"))
        eventually("and said again", lambda: caplog.text.count("rollcall/shop/most is refused") == 2)


def test_a_bad_value_at_the_start_leaves_what_it_was_started_with(registry: MemoryRegistry) -> None:
    registry.put("rollcall/shop/most", "none")
    with Instance(registry, "--most", "3") as one:
        eventually("it is refused", lambda: one.refuses("most"))
        assert (one.told("most")["value"], one.told("most")["source"]) == (3, "flag")


def test_a_bad_value_for_one_does_not_bring_back_what_is_for_all(registry: MemoryRegistry) -> None:
    with Instance(registry) as one:
        registry.put("rollcall/shop/most", "9")
        registry.put("rollcall/shop/shop-1/most", "11")
        one.becomes("most", 11, "rollcall/shop/shop-1/most")
        registry.put("rollcall/shop/shop-1/most", "none")
        eventually("it is refused", lambda: one.refuses("most"))
        assert one.settings.most == 11


@pytest.mark.parametrize("name", ["colour", "fixed", "host", "Most", "log_level"])
def test_what_cannot_change_is_refused_by_name(
    registry: MemoryRegistry, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with Instance(registry) as one:
        registry.put(f"rollcall/shop/{name}", "2")
        eventually("it is refused", lambda: one.refuses(name))
        (unknown,) = one.live.report()["unknown"]
        assert unknown["key"] == f"rollcall/shop/{name}"
        assert "most" in unknown["refused"], "it says which can"
        registry.delete(f"rollcall/shop/{name}")
        eventually("it is forgotten", lambda: not one.live.report()["unknown"])
        assert not one.refuses(name)
    assert caplog.text.count("is refused") == 1


def test_keys_of_others_are_theirs(registry: MemoryRegistry) -> None:
    for key in ("rollcall/shopping/most", "rollcall/shop/shop-2/most", "rollcall/shop/a/b/most", "rollcall/shop/", "x"):
        registry.put(key, "none")
    with Instance(registry) as one:
        registry.put("rollcall/shop/grace", "1")
        one.becomes("grace", 1.0, "rollcall/shop/grace")
        assert one.live.report()["unknown"] == []
        assert not any(each["refused"] for each in one.live.report()["settings"])


def test_the_log_level(registry: MemoryRegistry) -> None:
    with Instance(registry) as one:
        registry.put("rollcall/shop/log-level", "debug")
        one.becomes("log-level", "debug", "rollcall/shop/log-level")
        eventually("it is logged from", lambda: logging.root.level == logging.DEBUG)
        registry.delete("rollcall/shop/log-level")
        eventually("it is back", lambda: logging.root.level == logging.INFO)


def test_the_settings_of_calls_to_others(registry: MemoryRegistry) -> None:
    open_before, given = Policy({}), Policy({"retries": 1})
    with Instance(registry) as one:
        registry.put("rollcall/shop/retries", "0")
        eventually("it is taken", lambda: open_before.settings.retries == 0)
        assert given.settings.retries == 1, "what the code says stays"
        assert Policy({}).settings.retries == 0, "it is so for channels that are opened later"
        one.becomes("retries", 0, "rollcall/shop/retries")
        registry.delete("rollcall/shop/retries")
        eventually("it is back", lambda: open_before.settings.retries == 3)


def test_a_setting_of_both_has_to_fit_both(registry: MemoryRegistry) -> None:
    calls = Policy({})
    with Instance(registry) as one:
        registry.put("rollcall/shop/deadline", "2.5")
        one.becomes("deadline", 2.5, "rollcall/shop/deadline")
        assert one.settings.deadline == 2.5
        eventually("it is taken", lambda: calls.settings.deadline == 2.5)
        registry.put("rollcall/shop/deadline", "100")  # which calls to others could have
        eventually("it is refused", lambda: one.refuses("deadline"))
        assert calls.settings.deadline == one.settings.deadline == 2.5
