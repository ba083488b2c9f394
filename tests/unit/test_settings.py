"""Flag over environment over default; and a bad value is refused by its name."""

import re
from pathlib import Path
from typing import Any

import pytest

from rollcall.settings import BadSettingError, CallSettings, RegistrySettings, ServiceSettings, load


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ServiceSettings.model_fields, *CallSettings.model_fields, "consul_token"):
        monkeypatch.delenv(f"ROLLCALL_{name.upper()}", raising=False)


def test_defaults() -> None:
    settings = load(ServiceSettings, [])
    assert settings.consul == ("127.0.0.1:8500",)
    assert (settings.host, settings.port, settings.http_port, settings.check) == ("127.0.0.1", 0, 0, "")


def test_a_flag_wins_over_the_environment_which_wins_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLCALL_PORT", "5001")
    monkeypatch.setenv("ROLLCALL_WEIGHT", "7")
    settings = load(ServiceSettings, ["--port", "5002"])
    assert (settings.port, settings.weight, settings.drain) == (5002, 7, 2.0)


def test_kubernetes_is_found_by_what_a_pod_is_told_or_by_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLCALL_REGISTRY", "kubernetes")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(BadSettingError, match="ROLLCALL_KUBERNETES_API: expected to run in a pod"):
        load(RegistrySettings).open_registry()
    with pytest.raises(BadSettingError, match="ROLLCALL_KUBERNETES_API: expected the URL of Kubernetes' API"):
        load(RegistrySettings, ["--kubernetes_api", "127.0.0.1:8001", "--kubernetes_namespace", "x"]).open_registry()
    with pytest.raises(BadSettingError, match="ROLLCALL_KUBERNETES_NAMESPACE: expected the namespace to look in"):
        load(RegistrySettings, ["--kubernetes_api", "http://127.0.0.1:8001"]).open_registry()
    monkeypatch.setenv("ROLLCALL_KUBERNETES_NAMESPACE", "here")
    given = load(ServiceSettings, ["--kubernetes-api", "http://127.0.0.1:8001", "--host", "::"])
    assert str(given.open_registry()) == "Kubernetes at http://127.0.0.1:8001"
    assert given.advertised() == "127.0.0.1", "the address in the direction of that"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.2")
    found = load(ServiceSettings, ["--host", "::"])
    assert str(found.open_registry()) == "Kubernetes at https://127.0.0.2:443"
    assert found.advertised().startswith("127.")


def test_lists_are_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLCALL_CONSUL", "a:1, b:2,,c:3")
    settings = load(ServiceSettings, ["--tags", "eu west,canary"])
    assert settings.consul == ("a:1", "b:2", "c:3")
    assert settings.tags == ("eu west", "canary")
    assert load(ServiceSettings, ["--consul", "d:4,e:5"]).consul == ("d:4", "e:5")


def test_meta_is_by_key() -> None:
    assert load(ServiceSettings, ["--meta", "node=worker-1, zone=a=b"]).extra_meta() == {
        "node": "worker-1",
        "zone": "a=b",
    }
    assert load(ServiceSettings, []).extra_meta() == {}


def test_flags_have_dashes_and_one_more_than_there_is_is_refused() -> None:
    assert load(ServiceSettings, ["--http-port", "8080", "--check-interval=0.5"]).http_port == 8080
    with pytest.raises(BadSettingError, match="--nonsense"):
        load(ServiceSettings, ["--nonsense", "1"])


BAD: list[tuple[type[Any], str, str]] = [
    (ServiceSettings, "port", "http"),
    (ServiceSettings, "port", "-1"),
    (ServiceSettings, "port", "65536"),
    (ServiceSettings, "http_port", "65536"),
    (ServiceSettings, "weight", "0"),
    (ServiceSettings, "weight", "65536"),
    (ServiceSettings, "consul", ""),
    (ServiceSettings, "consul", " , "),
    (ServiceSettings, "meta", "node"),
    (ServiceSettings, "meta", "node="),
    (ServiceSettings, "meta", "=worker-1"),
    (ServiceSettings, "meta", "a b=c"),
    (ServiceSettings, "meta", "consul-x=y"),
    (ServiceSettings, "meta", "a=b,a=c"),
    (ServiceSettings, "meta", f"a={'b' * 513}"),
    (ServiceSettings, "meta", "protocol=smoke"),
    (ServiceSettings, "check", "ping"),
    (ServiceSettings, "check_interval", "0"),
    (ServiceSettings, "check_interval", "inf"),
    (ServiceSettings, "check_timeout", "-1"),
    (ServiceSettings, "drain", "-1"),
    (ServiceSettings, "drain", "nan"),
    (ServiceSettings, "drain", "soon"),
    (ServiceSettings, "grace", "inf"),
    (ServiceSettings, "log_format", "xml"),
    (ServiceSettings, "log_level", "loud"),
    (CallSettings, "deadline", "0"),
    (CallSettings, "deadline", "nan"),
    (CallSettings, "retries", "5"),
    (CallSettings, "retries", "-1"),
    (CallSettings, "subset", "0"),
    (CallSettings, "max_requests", "0"),
    (CallSettings, "failure_percent", "101"),
    (CallSettings, "ejection", "0"),
    (CallSettings, "ejection_percent", "101"),
    (CallSettings, "empty_grace", "-1"),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_a_bad_value_is_refused_by_the_name_of_its_setting(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], name: str, value: str
) -> None:
    flag, variable = f"--{name.replace('_', '-')}", f"ROLLCALL_{name.upper()}"
    named = re.escape(f"setting {name} ({variable}): ")
    if kind is ServiceSettings:
        with pytest.raises(BadSettingError, match=re.escape(f"setting {flag} ({variable}): ")):
            load(kind, [f"{flag}={value}"])
    else:
        with pytest.raises(BadSettingError, match=named):
            load(kind, overrides={name: value})
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadSettingError, match=named):
        load(kind)


def test_every_bad_value_is_told_at_once() -> None:
    with pytest.raises(BadSettingError, match=r"--port.*--weight"):
        load(ServiceSettings, ["--port=x", "--weight=0"])


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadSettingError, match="dedline"):
        load(CallSettings, overrides={"dedline": 1})


def test_a_bad_address_of_consul_is_a_bad_setting() -> None:
    with pytest.raises(BadSettingError, match=r"ROLLCALL_CONSUL: .*HOST:PORT.*'nonsense'"):
        load(ServiceSettings, ["--consul", "nonsense"]).open_registry()


def test_the_token_comes_by_environment_or_file_and_has_no_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadSettingError, match="consul-token"):
        load(ServiceSettings, ["--consul-token", "s3cret"])
    with pytest.raises(SystemExit) as ended:
        load(ServiceSettings, ["--help"], program="sum")
    assert ended.value.code == 0
    helped = capsys.readouterr().out
    assert "--consul-token-file" in helped
    assert "--consul-token " not in helped
    monkeypatch.setenv("ROLLCALL_CONSUL_TOKEN", "s3cret")
    settings = load(RegistrySettings)
    assert "s3cret" not in f"{settings!r} {settings.open_registry()}"


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(ServiceSettings, ["--help"], program="sum")
    helped = capsys.readouterr().out
    missing = [name for name in ServiceSettings.model_fields if f"--{name.replace('_', '-')}" not in helped]
    assert not missing


def test_the_address_to_advertise() -> None:
    assert load(ServiceSettings, ["--host", "127.0.0.2"]).advertised() == "127.0.0.2"
    assert load(ServiceSettings, ["--host", "0.0.0.0", "--advertise", "10.0.0.7"]).advertised() == "10.0.0.7"  # noqa: S104
    assert load(ServiceSettings, ["--host", "::"]).advertised() not in ("", "0.0.0.0")  # noqa: S104


def test_a_token_file_that_is_missing_is_told_when_it_is_read(tmp_path: Path) -> None:
    registry = load(ServiceSettings, ["--consul-token-file", str(tmp_path / "token")]).open_registry()
    with pytest.raises(Exception, match=r"token's file .* cannot be read"):
        registry.services()
