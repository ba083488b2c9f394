"""`rollcall`, the command, as people and programs run it, beside real instances on real Consul servers."""

import asyncio
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from deploy.local.cluster import SERVERS, Cluster
from deploy.local.guard import Guard
from rollcall.__main__ import main
from rollcall.registry import Instance, TtlCheck
from rollcall.registry.consul import ConsulRegistry
from tests.integration.fleet import ROOT, Fleet
from tests.waiting import eventually, free_port

COMMAND = [sys.executable, "-m", "rollcall"]
LATER = "import time; now = time.time; time.time = lambda: now() + 60; import rollcall.__main__ as r; r.main()"
STARTED = {"sum": 2, "hello": 1, "greeter": 1, "gateway": 1}


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def json(self) -> Any:
        return json.loads(self.out)


class System:
    """Instances of some services, and the command beside them."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.env = {**fleet.environment, "PYTHONPATH": str(ROOT)}

    def __call__(self, *arguments: str, stdin: str = "", program: tuple[str, ...] = (), **env: str) -> Ran:
        done = subprocess.run(
            [*(program or COMMAND), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env={**self.env, **env},
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def started(self, *arguments: str) -> Iterator[Any]:
        """Start the command, and see that it has gone in the end."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            [*COMMAND, *arguments], env=self.env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        ) as child:
            try:
                yield child
            finally:
                child.kill()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, module_cluster: Cluster, guard: Guard) -> Iterator[System]:
    fleet = Fleet(tmp_path_factory.mktemp("command"), module_cluster, guard)
    fleet.environment["ROLLCALL_CHECK_TIMEOUT"] = "5"  # none is to fail for a busy machine
    for name, count in STARTED.items():
        for number in range(1, count + 1):
            fleet.start(f"{name}-{number}", "--tags", "public", "--version", "1.0")
    yield System(fleet)
    fleet.close()


@pytest.fixture
def system(started: System, cluster: Cluster) -> System:
    """All of them pass, on a healthy cluster."""
    assert cluster is started.fleet.cluster
    for name, count in STARTED.items():
        asyncio.run(started.fleet.pass_all(name, count))
    return started


def test_what_is_registered_in_tables(system: System) -> None:
    ran = system("services")
    assert ran.code == 0, ran.err
    assert ran.lines[0].split() == ["SERVICE", "PASSING", "VERSION", "TAGS"]
    assert "sum      2/2      1.0      public" in ran.lines
    ran = system("instances", "sum")
    assert [line.split()[0] for line in ran.lines] == ["INSTANCE", "sum-1", "sum-2"]
    assert [line.split()[2] for line in ran.lines] == ["CHECK", "passing", "passing"]


def test_what_is_registered_as_json(system: System) -> None:
    found = {each["name"]: each for each in system("services", "--json").json()}
    assert found["sum"] == {"name": "sum", "instances": 2, "passing": 2, "versions": ["1.0"], "tags": ["public"]}
    (one, two) = system("instances", "sum", "--json").json()
    assert (one["id"], one["passing"], one["tags"], two["id"]) == ("sum-1", True, ["public"], "sum-2")
    assert system("instances", "sum", "--tag", "nobody's", "--json").json() == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("instances", "gretter"), "no service 'gretter'; did you mean 'greeter'?"),
        (("health", "summ"), "no service 'summ'; did you mean 'sum'?"),
        (("call", "sun.Add"), "no service 'sun'; did you mean 'sum'?"),
        (("call", "sum.add"), "no method of sum 'add'; did you mean 'Add'?"),
        (("call", "zzz.Add"), "no service 'zzz'; there are: consul, gateway, greeter, hello, sum"),
        (("deregister", "sum-11"), "no instance 'sum-11'; did you mean 'sum-1'?"),
        (("call", "gateway.Add"), "gateway speaks HTTP: call it at http://127.0.0.1:"),
    ],
)
def test_a_name_that_is_not_there(system: System, typed: tuple[str, ...], said: str) -> None:
    ran = system(*typed)
    assert ran.code == 1
    assert ran.err.startswith(f"rollcall: {said}")
    assert ran.out == ""


@pytest.mark.parametrize(
    ("typed", "answers"),
    [
        (("sum.Add", '{"num1": 333, "num2": 666}'), [{"res": "999"}]),
        (("sum.sum.v1.SumService.Add", '{"num1": 1, "num2": 2}'), [{"res": "3"}]),
        (("sum.Add",), [{"res": "0"}]),
        (("hello.HelloWorld", '"李白"'), ["李白 你好"]),
        (("greeter.Call", '{"name": "李白"}'), [{"msg": "Hello 李白"}]),
        (("sum.Add", "--metadata", "a=b", "--metadata", "key-bin=AAEC", "--deadline", "9"), [{"res": "0"}]),
    ],
)
def test_a_call(system: System, typed: tuple[str, ...], answers: list[Any]) -> None:
    ran = system("call", *typed)
    assert ran.code == 0, ran.err
    assert [json.loads(line) for line in ran.lines] == answers
    assert ran.err == ""


def test_calls_that_stream(system: System) -> None:
    assert len(system("call", "greeter.ServerStream", '{"count": 3}').lines) == 3
    (answer,) = system("call", "greeter.ClientStream", '{"stroke": 1}', '{"stroke": 2}').lines
    assert list(json.loads(answer).values()) == ["2"]
    ran = system("call", "greeter.BidiStream", "-", stdin='{"stroke": 7}\n\n{"stroke": 8}\n')
    assert [list(json.loads(line).values()) for line in ran.lines] == [["7"], ["8"]]


def test_what_is_streamed_is_answered_as_it_comes(system: System) -> None:
    with system.started("call", "greeter.BidiStream", "-") as child:
        for stroke in (1, 2):
            child.stdin.write(f'{{"stroke": {stroke}}}\n')
            child.stdin.flush()
            assert list(json.loads(child.stdout.readline()).values()) == [str(stroke)]
        child.stdin.close()
        assert child.wait(30) == 0


def test_a_call_that_is_over_does_not_wait_for_what_may_still_be_typed(system: System) -> None:
    with system.started("call", "greeter.BidiStream", "-", "--deadline", "0.5") as child:
        assert child.wait(30) == 64 + 4
        assert child.stderr.read().startswith("rollcall: DEADLINE_EXCEEDED: ")
    with system.started("call", "greeter.BidiStream", "-") as child:
        child.stdin.write('{"stroke": 1}\nnonsense\n')
        child.stdin.flush()
        assert child.wait(30) == 2
        assert "expected a BidiStreamRequest as JSON, found 'nonsense'" in child.stderr.read()
    with system.started("call", "greeter.BidiStream", "-") as child:
        child.stdin.write('{"stroke": 1}\n')
        child.stdin.flush()
        assert child.stdout.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr.read() == "\n"


def test_whoever_reads_the_answers_may_stop(system: System) -> None:
    shell = f"{shlex.join(COMMAND)} call greeter.ServerStream '{{\"count\": 100000}}' | head -1"
    ran = system(program=("bash", "-c", shell))
    assert (ran.code, ran.out, ran.err) == (0, '{"count": "0"}\n', "")


def test_who_has_answered_is_said_when_asked_for(system: System) -> None:
    for method, who in (("sum.Add", r"sum-[12]"), ("hello.HelloWorld", "hello-1")):
        ran = system("call", method, "-v", *(['"x"'] if "hello" in method else []))
        assert re.fullmatch(rf"answered by {who} in [0-9.]+ ms\n", ran.err)


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (("call", "sum.Add", "nonsense"), 2, "expected a AddRequest as JSON, found 'nonsense'"),
        (("call", "sum.Add", '{"num9": 1}'), 2, 'no field named "num9"'),
        (("call", "sum.Add", "{}", "{}"), 2, "expected one message for Add"),
        (("call", "hello.HelloWorld", "nonsense"), 2, "expected JSON, found 'nonsense'"),
        (("call", "greeter.ClientStream", "nonsense"), 2, "expected a "),
        (("call", "sum"), 2, "expected SERVICE.METHOD, such as sum.Add, found 'sum'"),
        (("call", "sum.Add", "--metadata", "Upper=1"), 2, "expected metadata as key=VALUE"),
        (("call", "sum.Add", "--metadata", "name=李白"), 2, "expected metadata as key=VALUE"),
        (("call", "sum.Add", "--metadata", "key-bin=!"), 2, "expected the value of key-bin in base64"),
        (("call", "hello.HelloWorld", "--metadata", "key=1"), 2, "hello speaks JSON-RPC, which has none"),
        (("call", "sum.Add", "--deadline", "nan"), 2, "expected seconds, more than 0 and at most 86400"),
        (("call", "sum.Add", "--tag", "typo"), 1, "no instance of sum with tag 'typo' passes its checks"),
        (("call", "hello.HelloWorld", '"\\ud800"'), 2, "expected JSON, found"),
        (("call", "greeter.ServerStream", '{"count": -1}'), 64 + 3, "INVALID_ARGUMENT: count: must be from 0"),
        (("call", "greeter.ServerStream", '{"count": 10000000}', "--deadline", "0.05"), 64 + 4, "DEADLINE_EXCEEDED: "),
        (("call", "hello.HelloWorld", "5"), 64 + 2, "UNKNOWN: "),
        (("instances",), 2, "Missing argument 'NAME'"),
        (("nonsense",), 2, "No such command 'nonsense'"),
    ],
)
def test_what_fails_says_why_and_with_which_code(system: System, typed: tuple[str, ...], code: int, said: str) -> None:
    ran = system(*typed)
    assert said in ran.err
    assert ran.code == code


def test_a_watch(system: System) -> None:
    with system.started("watch", "sum") as child:
        shown = [child.stdout.readline() for _ in range(2)]
        assert [line.split()[0::3] for line in shown] == [["+", "passing"], ["+", "passing"]]
        system.fleet.start("sum-3", "--version", "1.0")
        assert re.fullmatch(r"\+ sum-3  127\.0\.0\.1:[0-9]+  passing\n", child.stdout.readline())
        system.fleet.kill("sum-3")
        assert re.fullmatch(r"~ sum-3  127\.0\.0\.1:[0-9]+  failing\n", child.stdout.readline())
        assert system("deregister", "sum-3").out.startswith("deregistered sum-3, of sum, at 127.0.0.1:")
        assert child.stdout.readline() == "- sum-3\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130


def test_a_watch_as_json(system: System) -> None:
    with system.started("watch", "sum", "--json") as child:
        assert [each["id"] for each in json.loads(child.stdout.readline())] == ["sum-1", "sum-2"]


@pytest.fixture
def without_keys(system: System) -> Iterator[None]:
    yield
    registry = ConsulRegistry(system.fleet.cluster.addresses)
    for key in registry.keys("rollcall/"):
        registry.delete(key)


@pytest.mark.usefixtures("without_keys")
def test_settings_are_shown_changed_and_taken_back(system: System) -> None:
    shown = [["SERVICE", "SETTING", "VALUE", "FROM", "INSTANCES"]]
    ran = system("kv", "get", "sum", "log-level")
    assert [line.split() for line in ran.lines] == [*shown, ["sum", "log-level", "info", "default", "sum-1,", "sum-2"]]
    ran = system("kv", "set", "sum", "log-level", "debug")
    now = ["sum", "log-level", "debug", "rollcall/sum/log-level", "sum-1,", "sum-2"]
    assert [line.split() for line in ran.lines] == [*shown, now]
    ran = system("kv", "set", "sum", "log-level", "error", "--instance", "sum-2")
    own = ["sum", "log-level", "error", "rollcall/sum/sum-2/log-level", "sum-2"]
    assert [line.split() for line in ran.lines] == [*shown, own]
    ran = system("kv", "get", "sum", "log-level")
    assert [line.split() for line in ran.lines[1:]] == [[*now[:4], "sum-1"], own]
    ran = system("kv", "unset", "sum", "log-level", "--instance", "sum-2")
    assert [line.split() for line in ran.lines] == [*shown, now]
    assert system("kv", "unset", "sum", "log-level").code == 0
    for typed, source in ((("set", "sum", "drain", "1"), "rollcall/sum/drain"), (("unset", "sum", "drain"), "default")):
        told = system("kv", *typed, "--json").json()
        assert [(each["instance"], each["settings"][0]["source"]) for each in told] == [
            ("sum-1", source),
            ("sum-2", source),
        ]
    ran = system("kv", "get", "--json")
    assert ran.code == 0, ran.err
    told = {each["instance"]: each["settings"] for each in ran.json()}
    assert sorted(told) == ["gateway-1", "greeter-1", "hello-1", "sum-1", "sum-2"]
    assert {each["source"] for settings in told.values() for each in settings} == {"default"}
    assert "max-calls" in {each["name"] for each in told["gateway-1"]}


@pytest.mark.usefixtures("without_keys")
def test_a_value_that_cannot_be_is_refused_by_those_it_is_for(system: System) -> None:
    ran = system("kv", "set", "sum", "retries", "seven")
    assert ran.code == 1
    assert re.search(r"refused  'seven' of rollcall/sum/retries by sum-1, sum-2: .*integer", ran.out)
    assert "rollcall: what was in force stays: set another value, or: rollcall kv unset sum retries" in ran.err
    ran = system("kv", "get", "sum", "retries")
    assert ran.code == 1
    assert ran.lines[1].split()[:4] == ["sum", "retries", "3", "default"]
    assert system("kv", "set", "sum", "retries", "1").code == 0
    assert system("kv", "get", "sum", "retries").code == 0


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (("get", "smu"), 1, "no service 'smu'; did you mean 'sum'?"),
        (("get", "sum", "log-levl"), 1, "'log-levl'; did you mean 'log-level'?"),
        (("set", "sum", "colour", "red"), 1, "no setting of sum that can change while it runs: 'colour'; there are: "),
        (("set", "sum", "retries", "1", "--instance", "sum-9"), 1, "no instance of sum 'sum-9'; did you mean 'sum-"),
        (("unset", "sum", "retries"), 1, "no setting of sum in Consul at "),
        (("set", "sum", "retries"), 2, "Missing argument 'VALUE'"),
        (("watch",), 2, "Missing argument 'SERVICE'"),
    ],
)
def test_settings_that_are_not_there(system: System, typed: tuple[str, ...], code: int, said: str) -> None:
    ran = system("kv", *typed)
    assert said in ran.err
    assert ran.code == code


@pytest.mark.usefixtures("without_keys")
def test_a_watch_on_settings(system: System) -> None:
    with system.started("kv", "watch", "sum") as child:
        assert child.stdout.readline() == "no key yet\n"
        system("kv", "set", "sum", "retries", "1")
        assert child.stdout.readline() == "+ rollcall/sum/retries  1\n"
        system("kv", "set", "sum", "retries", "2")
        assert child.stdout.readline() == "~ rollcall/sum/retries  2\n"
        system("kv", "unset", "sum", "retries")
        assert child.stdout.readline() == "- rollcall/sum/retries\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130


@pytest.mark.usefixtures("without_keys")
def test_an_instance_that_does_not_tell_its_settings(system: System) -> None:
    registry = ConsulRegistry(system.fleet.cluster.addresses)
    mute = Instance(
        id="mute-1", name="mute", address="127.0.0.1", port=free_port(), meta={"http_port": str(free_port())}
    )
    registry.register(mute, TtlCheck(60))
    try:
        ran = system("kv", "get", "mute")
        assert ran.code == 1
        assert re.search("problem  mute-1 does not tell its settings: .*refused", ran.out)
        ran = system("kv", "set", "mute", "log-level", "debug")
        assert ran.code == 1
        assert "nobody to ask whether mute has a setting 'log-level': mute-1: does not tell" in ran.err
        assert registry.keys("rollcall/mute/") == {}
    finally:
        registry.deregister(mute.id)


def test_health(system: System) -> None:
    ran = system("health")
    assert ran.code == 0, ran.out
    assert {line.split()[1]: line.split()[4] for line in ran.lines[1:]} == {
        "gateway-1": "it",
        "greeter-1": "SERVING",
        "hello-1": "it",
        "sum-1": "SERVING",
        "sum-2": "SERVING",
    }
    system.fleet.kill("sum-2")
    try:
        asyncio.run(system.fleet.pass_all("sum", 1))
        ran = system("health", "sum", "--json")
        assert ran.code == 1
        assert [(each["id"], each["well"], each["passing"]) for each in ran.json()] == [
            ("sum-1", True, True),
            ("sum-2", False, False),
        ]
    finally:
        system.fleet.start("sum-2")


@pytest.mark.parametrize(("name", "said"), [("hello", "its probes have not answered within 2 s"), ("sum", "DEADLINE")])
def test_who_hangs_is_not_well(system: System, name: str, said: str) -> None:
    """Who is checked by TCP passes that check meanwhile: the kernel takes the connection."""
    system.fleet.signal(f"{name}-1", signal.SIGSTOP)
    try:
        ran = system("health", name)
        assert ran.code == 1
        assert said in ran.out
        ran = system("doctor")
        assert ran.code == 1
        assert re.search(rf"problem  {name}-1 of {name} at \S+ says that it is not well \(.*{said}", ran.out)
    finally:
        system.fleet.signal(f"{name}-1", signal.SIGCONT)
    asyncio.run(system.fleet.pass_all(name, STARTED[name]))


def test_a_doctor_who_finds_nothing(system: System) -> None:
    ran = system("doctor")
    assert ran.code == 0, ran.out
    assert ran.lines == [f"looked at {system.fleet.registry}, 4 services and 5 instances: no problems"]
    assert system("doctor", "--json").json() == {"problems": [], "notes": []}


def test_registrations_that_are_wrong(system: System) -> None:
    registry = system.fleet.registry
    target = {each.id: each for each in registry.instances("sum")}["sum-1"]
    wrong = [
        Instance(id="unreachable", name="lost", address="127.0.0.1", port=free_port()),
        Instance(id="twice", name="sum", address=target.address, port=target.port, version="2.0"),
    ]
    for instance in wrong:
        registry.register(instance, TtlCheck(60))
    system.fleet.start("sum-4", "--version", "1.0")
    asyncio.run(system.fleet.pass_all("sum", 4))
    system.fleet.kill("sum-4")
    asyncio.run(system.fleet.pass_all("sum", 3))
    try:
        ran = system("doctor")
        assert ran.code == 1
        text = re.sub(r":[0-9]{4,5}", ":PORT", ran.out)
        assert "unreachable of lost at 127.0.0.1:PORT passes its check, and cannot be reached from here (" in text
        assert "sum-4 of sum at 127.0.0.1:PORT leads nowhere (" in text
        assert "rollcall deregister sum-4" in text
        assert "sum-1, twice are all registered at 127.0.0.1:PORT, which one of them is" in text
        assert "note     sum runs in 2 versions, as it should only during an update (1.0: " in text
        assert "2.0: twice)" in text
        assert text.count("problem  ") == 3
        system("deregister", "sum-4")
        system("deregister", "twice")
        assert system("doctor", "--json").json()["problems"][0].startswith("unreachable of lost")
    finally:
        for id_ in ("unreachable", "twice", "sum-4"):
            registry.deregister(id_)


def test_a_registration_that_is_held_elsewhere_is_said_to_be_there_still(system: System) -> None:
    one, other, _ = system.fleet.cluster.addresses
    holder = ConsulRegistry([one])
    holder.register(Instance(id="held", name="held", address="127.0.0.1", port=1), TtlCheck(60))
    ran = system("--consul", other, "deregister", "held")
    assert ran.code == 1
    assert ran.err.startswith("rollcall: held of held is listed still, or again: ")
    assert system("--consul", one, "deregister", "held").out == "deregistered held, of held, at 127.0.0.1:1\n"
    holder.register(Instance(id="held", name="held", address="127.0.0.1", port=1), TtlCheck(60))
    assert system("--consul", one, "deregister", "held", "--json").json()["address"] == "127.0.0.1"


def test_a_service_that_nobody_can_call(system: System) -> None:
    registry = system.fleet.registry
    registry.register(Instance(id="ill", name="ill", address="127.0.0.1", port=free_port()), TtlCheck(0.1))
    try:
        eventually("it fails", lambda: not registry.instances("ill"))
        assert "ill: no instance passes its checks, so that nobody can call it" in system("doctor").out
    finally:
        registry.deregister("ill")


def test_clocks_that_are_apart(system: System) -> None:
    ran = system("doctor", program=(sys.executable, "-c", LATER))
    assert ran.code == 1
    behind = [line for line in ran.lines if re.search(r": its clock is (5[7-9]|60) s behind this machine's", line)]
    assert len(behind) == len(SERVERS) + sum(STARTED.values()), ran.out


def test_a_consul_in_trouble(system: System, cluster: Cluster) -> None:
    cluster.stop_server(1, signal.SIGKILL)
    ran = system("doctor")
    assert ran.code == 1
    assert f"http://{cluster.addresses[0]}: connection refused or lost; expected a Consul server there" in ran.out
    cluster.stop_server(2, signal.SIGKILL)

    def leaderless() -> str:
        out = system("doctor").out
        return out if "follows no leader" in out else ""

    said = eventually("the last one knows no leader", leaderless, 30)
    assert f"{cluster.addresses[2]} follows no leader: expected more than half of Consul's servers" in said
    ran = system("instances", "sum")
    assert ran.code == 0, "what it knows can be looked at"
    assert ran.err.startswith("sum: this may be old: no Consul server could be asked (")
    cluster.stop_server(3, signal.SIGKILL)
    begun = time.monotonic()
    for typed in (("services",), ("doctor",), ("call", "sum.Add")):
        ran = system(*typed)
        assert ran.code == 3
        assert "no Consul server could be asked" in ran.err
        assert "is it running, and there? See --consul" in ran.err
    assert time.monotonic() - begun < 30
    cluster.start()


def test_another_consul_by_flag(system: System) -> None:
    ran = system("--consul", system.fleet.cluster.addresses[1], "services", ROLLCALL_CONSUL="127.0.0.1:1")
    assert ran.code == 0, ran.err
    assert system("call", "--help", ROLLCALL_CONSUL="nonsense").code == 0
    ran = system("--consul", "nonsense", "services")
    assert ran.code == 2
    assert "expected a Consul server as HOST:PORT" in ran.err


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_on_a_terminal_only(system: System, no_color: str) -> None:
    assert "\x1b" not in system("services").out
    ours, theirs = pty.openpty()
    env = {**system.env, "NO_COLOR": no_color}
    with subprocess.Popen([*COMMAND, "instances", "sum"], env=env, stdout=theirs) as child:
        assert child.wait(20) == 0
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[32mpassing\x1b[0m" in shown) == (not no_color)


def test_a_shell_completes_commands_services_and_methods(system: System, tmp_path: Path) -> None:
    command = tmp_path / "rollcall"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rollcall "$@"\n')
    command.chmod(0o755)
    env = {**system.env, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def complete(*words: str) -> list[str]:
        script = 'eval "$(rollcall completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        script += '_rollcall_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
        return subprocess.run(
            ["bash", "-c", script, "bash", "rollcall", *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()

    assert complete("in") == ["instances"]
    assert complete("instances", "g") == ["gateway", "greeter"]
    assert complete("call", "su") == ["sum."]
    assert complete("call", "greeter.C") == ["greeter.Call", "greeter.ClientStream"]
    assert complete("call", "hello.") == ["hello.HelloWorld"]
    for shell in ("fish", "zsh"):
        assert "_ROLLCALL_COMPLETE" in system("completion", shell).out


def test_without_click_the_library_works_and_the_command_says_what_it_needs(tmp_path: Path) -> None:
    hidden = tmp_path / "click.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'click'\", name='click')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([*COMMAND, "services"], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr == "rollcall: the command needs click: pip install 'rollcall-chassis[cli]'\n"


def test_what_is_installed_as_the_command_is_it() -> None:
    (where,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
    assert EntryPoint("rollcall", where, "console_scripts").load() is main
