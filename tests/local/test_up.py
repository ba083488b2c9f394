"""`make up`, `make status`, `make logs` and `make down`, as a user runs them, on ports and in a folder of their own."""

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from deploy.local import process
from deploy.local.cluster import Cluster, ports_from
from deploy.local.guard import Guard
from deploy.local.services import ROOT, TABLE, missing, rows
from deploy.local.sites import ConsulSite
from tests.up import Local, free_ports_from

IDS = [instance for service in TABLE for instance in service.ids()]
SERVER_NAMES = ["consul-1", "consul-2", "consul-3"]
CALLS = r"""hello\.HelloWorld\("李白"\) = "李白 你好" +answered by hello-[123]
sum\.Add\(333, 666\) = 999 +answered by sum-[123]
person\.Do\(name="李白", age=333\) = "李白 is sleeping", 999 +answered by person-[123]
student\.AddFunc\(name="李白", age=33, score=\[90, 85, 77\]\) = id \d+, total 252 +answered by student-[123]
greeter\.Call\("李白"\) = "Hello 李白" +answered by greeter-[123]
POST http://127\.0\.0\.1:\d+/v1/sum/Add = {"res":"999"} +answered by sum-[123], through gateway-1
abacus\.Add\(333, 666\) = 999 +answered by abacus, which knows nothing of Rollcall
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path, guard: Guard) -> Iterator[Local]:
    local = Local(tmp_path_factory.mktemp("up"), free_ports_from(), consul_binary)
    yield local
    for pid in local.pids().values():  # in case a test failed half-way, or `down` does not work
        guard.watch(pid)
    local("down", "--purge")


@pytest.fixture
def running(local: Local, guard: Guard) -> Local:
    if sorted(local.pids()) != sorted([*SERVER_NAMES, *IDS]):
        code, out, err = local("up")
        for pid in local.pids().values():
            guard.watch(pid)
        assert code == 0, out + err
    return local


def test_up_starts_all_of_it_and_shows_it_at_work(running: Local) -> None:
    code, out, _ = running("up")
    assert code == 0
    assert re.match(CALLS, out), out
    assert f"http://127.0.0.1:{running.port}/ui" in out
    assert "make down" in out
    assert sorted(running.pids()) == sorted([*SERVER_NAMES, *IDS])


def test_the_readme_shows_what_up_prints(running: Local) -> None:
    """All of it, but for what may be another at each start: who answered, ids, ports and where the leader is."""
    shown = re.search(r"<!-- output of make up -->\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown
    _, out, _ = running("up")
    assert alike(shown[1]) == alike(out.replace(str(running.run), ".run"))


def alike(output: str) -> str:
    for pattern, instead in (
        (r"(answered by \w+)-\d\b", r"\1-N"),
        (r"\bid \d+", "id N"),
        (r"127\.0\.0\.1:\d+", "ADDRESS:PORT"),
        (r"\b(consul-\d .*? passing)(, leader)?\b", r"\1"),
        (r"(?m)(?<=\S) {2,}", "  "),  # between columns: their widths follow from the above
    ):
        output = re.sub(pattern, instead, output)
    return output


def test_up_again_changes_nothing(running: Local) -> None:
    before = running.pids()
    stored = [re.findall(r"id (\d+), total 252", running("up")[1]) for _ in range(2)]
    assert stored[0], "the student that `up` adds"
    assert stored[0] == stored[1]
    assert running.pids() == before


def test_up_starts_only_what_is_missing(running: Local) -> None:
    before = running.pids()
    psutil.Process(before["sum-2"]).kill()
    psutil.wait_procs([psutil.Process(before["sum-2"])], timeout=5)
    code, out, _ = running("status")
    assert code == 1
    assert re.search(r"sum-2 +- +not running", out)
    assert running("up")[0] == 0
    after = running.pids()
    assert {name for name in after if after[name] != before[name]} == {"sum-2"}


def test_status_needs_no_settings_and_sees_all_of_it_pass(running: Local) -> None:
    del running.env["CONSUL_HTTP_PORT"]
    code, out, err = running("status")
    running.env["CONSUL_HTTP_PORT"] = str(running.port)
    assert code == 0, out + err
    assert out.count("passing") == len(SERVER_NAMES) + len(IDS)
    assert out.count("passing, leader") == 1


def test_logs_of_one_service(running: Local) -> None:
    code, out, _ = running("logs", "person")
    assert code == 0
    assert {line.partition(" ")[0] for line in out.splitlines()} == {"person-1", "person-2", "person-3"}
    code, _, err = running("logs", "nobody")
    assert code == 1
    assert "logs of nobody" in err


def test_logs_follow_until_ctrl_c(running: Local) -> None:
    log = running.run / "logs" / "consul-1.log"
    with running.start("logs", "-f", "consul-1") as follow:
        assert follow.stdout is not None
        assert follow.stdout.readline()
        with log.open("a") as file:
            file.write("something new\n")
        while "something new" not in (line := follow.stdout.readline()):
            assert line, "the log should go on"
        follow.send_signal(signal.SIGINT)
        _, err = follow.communicate(timeout=10)
    assert (follow.returncode, err) == (130, "interrupted\n")


def test_another_port_is_refused_while_it_runs(running: Local) -> None:
    running.env["CONSUL_HTTP_PORT"] = "8500"
    code, _, err = running("up")
    running.env["CONSUL_HTTP_PORT"] = str(running.port)
    assert code == 1
    assert f"what runs was started with CONSUL_HTTP_PORT {running.port}, not 8500: make down first" in err


def test_a_service_that_does_not_start_is_named_with_its_log_and_the_others_run_on(running: Local) -> None:
    before = running.pids()
    psutil.Process(before.pop("sum-2")).kill()
    good, running.env["ROLLCALL_DRAIN"] = running.env["ROLLCALL_DRAIN"], "-1"
    code, out, err = running("up")
    running.env["ROLLCALL_DRAIN"] = good
    assert (code, out) == (1, "")
    assert re.search(r"error: sum-2 exited while starting; the last lines of .*\.log:\n    .*ROLLCALL_DRAIN", err), err
    assert running.pids() == before


def test_down_stops_all_of_it_lets_services_deregister_and_keeps_the_data_until_purged(running: Local) -> None:
    site = ConsulSite(Cluster(running.run, ports_from(running.port), Path("consul"), abacus=1))
    assert {row.health for row in rows(site)} == {"passing"}
    code, out, err = running("down")
    assert code == 0
    assert all(name in out for name in [*SERVER_NAMES, *IDS])
    assert "had to be killed" not in err
    assert running.pids() == {}
    assert missing(site) == IDS
    assert (running.run / "data" / "consul-1").is_dir()
    assert (running.run / "data" / "student.db").is_file()
    assert running("down")[:2] == (0, "nothing was running\n")
    assert running("down", "--purge")[0] == 0
    assert not (running.run / "data").exists()


def test_a_taken_port_is_one_line_and_starts_nothing(local: Local) -> None:
    local("down")
    with closing(socket.socket()) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last test may linger
        taken.bind(("127.0.0.1", local.port))
        taken.listen()
        code, out, err = local("up")
    assert (code, out) == (1, "")
    assert f"port {local.port} (HTTP of consul-1)" in err
    assert err.count("\n") == 1
    assert local.pids() == {}


def test_ctrl_c_stops_what_this_run_started(local: Local) -> None:
    local("down")
    with local.start("up") as command:
        while not process.running(local.run, "sum-1"):  # half-way
            assert command.poll() is None, command.communicate()
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert local.pids() == {}
    strays = [
        found
        for found in psutil.process_iter(["cmdline"])
        if f":{local.port}," in " ".join(found.info["cmdline"] or ())
    ]
    assert not strays, "one may have been started, but not recorded, when the signal came"


@pytest.mark.parametrize("setting", ["http", "0", "65530"])
def test_a_bad_port_is_refused(local: Local, setting: str) -> None:
    good, local.env["CONSUL_HTTP_PORT"] = local.env["CONSUL_HTTP_PORT"], setting
    code, _, err = local("up")
    local.env["CONSUL_HTTP_PORT"] = good
    assert code == 1
    assert f"CONSUL_HTTP_PORT should be a port between 1 and 65493, but it is '{setting}'" in err
