"""`make up` in its other shapes: with client agents, and with a second datacenter."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from deploy.local.guard import Guard
from deploy.local.services import TABLE
from tests.up import Local, free_ports_from
from tests.waiting import eventually

NODES = {n: [f"consul-{3 * n - 2}", f"consul-{3 * n - 1}", f"consul-{3 * n}", f"consul-agent-{n}"] for n in (1, 2)}
CALLS = r"""From dc1:
hello\.HelloWorld\("李白"\) = "李白 你好" +answered by hello-[123]
sum\.Add\(333, 666\) = 999 +answered by sum-[123]
person\.Do\(.*\) = .* +answered by person-[123]
student\.AddFunc\(.*\) = id \d+, total 252 +answered by student-[123]
greeter\.Call\("李白"\) = "Hello 李白" +answered by greeter-[123]
POST .* = {"res":"999"} +answered by sum-[123], through gateway-1
abacus\.Add\(333, 666\) = 999 +answered by abacus, .*

From dc2:
hello\.HelloWorld\("李白"\) = "李白 你好" +answered by hello-[456]
sum\.Add\(333, 666\) = 999 +answered by sum-[456]
person\.Do\(.*\) = .* +answered by person-[456]
student\.AddFunc\(.*\) = id \d+, total 252 +answered by student-[123]
greeter\.Call\("李白"\) = "Hello 李白" +answered by greeter-[456]
POST .* = {"res":"999"} +answered by sum-[123], through gateway-1
abacus\.Add\(333, 666\) = 999 +answered by abacus, .*
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Local]:
    local = Local(tmp_path_factory.mktemp("topology"), free_ports_from(), consul_binary)
    local.env |= {"AGENTS": "client", "DATACENTERS": "2"}
    yield local
    for pid in local.pids().values():
        guard.watch(pid)
    local("down", "--purge")


def test_two_datacenters_with_client_agents(local: Local) -> None:
    """One test, as it takes a while to start: each step stands on the one before."""
    code, out, err = local("up")
    assert code == 0, out + err
    assert re.match(CALLS, out), out
    expected = [name for n in NODES for name in (*NODES[n], *(each for row in TABLE for each in row.ids(n)))]
    assert sorted(local.pids()) == sorted(expected)
    assert local("status")[0] == 0

    for n in NODES:
        port = local.port + 3 * (n - 1)
        listed = requests.get(f"http://127.0.0.1:{port}/v1/health/service/sum?passing", timeout=5).json()
        assert {entry["Node"]["Node"] for entry in listed} == {f"consul-agent-{n}"}
        assert {entry["Node"]["Datacenter"] for entry in listed} == {f"dc{n}"}

    del local.env["AGENTS"]
    code, out, err = local("up")
    assert (code, out) == (1, "")
    assert "what runs was started with AGENTS client, not unset: make down first" in err
    local.env["AGENTS"] = "client"

    before = local.pids()
    local.kill("consul-agent-2")
    code, out, _ = local("status")
    assert code == 1
    assert re.search(r"consul-agent-2 +127\.0\.0\.1:\d+ +not running", out)
    code, out, err = local("up")
    assert code == 0, out + err
    after = local.pids()
    assert {name for name in after if after[name] != before[name]} == {"consul-agent-2"}

    code, _, err = local("down")
    assert code == 0
    assert "had to be killed" not in err
    eventually("all have gone", lambda: not local.pids())


def command(local: Local, *arguments: str, code: int = 0) -> str:
    """Run `rollcall` beside what runs without Consul, as a person does there."""
    env = {**os.environ, "ROLLCALL_REGISTRY": "mdns", "ROLLCALL_MDNS_GROUP": f"rollcall-{local.port}"}
    ran = subprocess.run(
        [sys.executable, "-m", "rollcall", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == code, ran.stderr
    return ran.stdout + ran.stderr


def test_without_consul(tmp_path: Path, guard: Guard) -> None:
    local = Local(tmp_path, free_ports_from(), Path("no consul is needed"))
    local.env["REGISTRY"] = "mdns"
    try:
        code, out, err = local("up")
        for pid in local.pids().values():
            guard.watch(pid)
        assert code == 0, out + err
        calls = CALLS.partition("\n\n")[0]
        assert re.match("".join(calls.splitlines(keepends=True)[1:-1]), out), out
        assert "Consul" not in out
        expected = [each for row in TABLE if row.name != "abacus" for each in row.ids()]
        assert sorted(local.pids()) == sorted(expected)
        assert local("status")[0] == 0
        assert '{"res": "999"}' in command(local, "call", "sum.Add", '{"num1": 333, "num2": 666}')
        services = json.loads(command(local, "services", "--json"))
        assert {each["name"]: each["passing"] for each in services} == {
            row.name: len(row.ids()) for row in TABLE if row.name != "abacus"
        }
        assert "no problems" in command(local, "doctor")
        assert "keeps no settings" in command(local, "kv", "set", "sum", "log-level", "debug", code=1)
        local.kill("sum-2")
        code, out, _ = local("status")
        assert code == 1
        assert re.search(r"sum-2 +- +not running", out)
        assert local("up")[0] == 0
        local.env["REGISTRY"] = "consul"
        code, _, err = local("up")
        assert code == 1
        assert "what runs was started with REGISTRY mdns, not consul: make down first" in err
    finally:
        code, _, err = local("down", "--purge")
    assert code == 0
    assert "had to be killed" not in err


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("AGENTS", "server", "AGENTS should be 'client' or unset"),
        ("DATACENTERS", "3", "DATACENTERS should be 1 or 2"),
        ("REGISTRY", "etcd", "REGISTRY should be consul or mdns"),
    ],
)
def test_what_cannot_be_is_refused(local: Local, setting: str, value: str, expected: str) -> None:
    good, local.env[setting] = local.env.get(setting, ""), value
    code, out, err = local("up")
    local.env[setting] = good
    assert (code, out) == (1, "")
    assert f"{expected}, but it is '{value}'" in err
