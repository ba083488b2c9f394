"""Three real Consul servers: started, killed, frozen, restarted, wiped."""

import json
import shutil
import signal
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from deploy.local import LocalError
from deploy.local.cluster import ABACUS, CONFIG, SERVERS, START_SECONDS, Cluster, free_ports, ports_from
from deploy.local.guard import Guard
from tests.waiting import eventually


def test_every_server_answers_and_agrees_on_the_leader(cluster: Cluster) -> None:
    assert cluster.leader() in SERVERS
    assert len(cluster.addresses) == 3
    assert len(cluster.get("/v1/status/peers")) == 3


def test_a_new_leader_when_the_leader_is_killed_and_the_old_one_comes_back_a_voter(cluster: Cluster) -> None:
    killed = cluster.leader()
    cluster.stop_server(killed, signal.SIGKILL)
    assert not cluster.running(killed)
    assert cluster.wait_for_leader() != killed
    cluster.start_server(killed)
    cluster.wait_for_leader()


def test_a_new_leader_when_the_leader_freezes(cluster: Cluster) -> None:
    frozen = cluster.leader()
    cluster.stop_server(frozen, signal.SIGSTOP)
    assert cluster.running(frozen)
    # Not whole: autopilot waits for the frozen one at each look, and may not think well of the others meanwhile.
    eventually("another leads", lambda: cluster.leader() not in (0, frozen), START_SECONDS)
    cluster.stop_server(frozen, signal.SIGCONT)
    cluster.wait_for_leader()


def test_data_outlives_a_stop_of_all_three(cluster: Cluster) -> None:
    put = cluster._session.put(f"http://{cluster.addresses[0]}/v1/kv/kept", data="yes", timeout=5)
    assert put.json() is True
    assert cluster.stop() == [1, 2, 3]
    assert cluster.start() == [1, 2, 3]
    assert cluster.get("/v1/kv/kept")[0]["Value"] == "eWVz"


def test_a_server_without_its_data_joins_again(cluster: Cluster) -> None:
    lost = next(n for n in SERVERS if n != cluster.leader())
    with pytest.raises(LocalError, match="stop it first"):
        cluster.wipe_data(lost)
    cluster.stop_server(lost)
    cluster.wipe_data(lost)
    cluster.start_server(lost)
    leader = cluster.wait_for_leader()
    peers = cluster._get(leader, "/v1/operator/raft/configuration")["Servers"]
    assert {peer["ID"] for peer in peers if peer["Voter"]} == {cluster._raft(n)[0] for n in SERVERS}


def test_what_runs_is_adopted(cluster: Cluster) -> None:
    pids = [cluster.server(n).pid for n in SERVERS]
    again = Cluster(cluster.run, list(cluster.ports.values()), cluster.binary)
    assert again.start() == []
    assert [again.server(n).pid for n in SERVERS] == pids


def test_a_taken_port_is_named_with_its_purpose_its_holder_and_the_setting(tmp_path: Path) -> None:
    ports = free_ports()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", ports[1].http))
        taken.listen()
        with pytest.raises(LocalError, match=rf"port {ports[1].http} \(HTTP of consul-2\).*CONSUL_HTTP_PORT") as error:
            Cluster(tmp_path, ports, Path("consul")).start()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "logs").exists(), "nothing may be started"


def test_a_server_that_exits_is_reported_with_its_log_and_the_others_are_stopped(
    tmp_path: Path, consul_binary: Path, guard: Guard
) -> None:
    cluster = Cluster(tmp_path, free_ports(), consul_binary, on_start=guard.watch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "consul-2").write_text("a file where a folder should be")
    with pytest.raises(LocalError, match=r"consul-2 exited while starting[^\n]*consul-2\.log:\n    "):
        cluster.start()
    assert not any(cluster.running(n) for n in SERVERS)
    shutil.rmtree(tmp_path / "data")


@pytest.mark.parametrize("n", SERVERS)
def test_the_files_are_valid_for_a_start_by_hand(n: int, tmp_path: Path, consul_binary: Path) -> None:
    # `consul validate` wants a data directory and takes none by flag, so it is handed in as one more file.
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"data_dir": str(tmp_path)}))
    files = [CONFIG / "common.json", CONFIG / "abacus.json", CONFIG / f"server-{n}", data]
    said = subprocess.run([consul_binary, "validate", *files], capture_output=True, text=True, timeout=20, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize("n", SERVERS)
def test_the_files_hold_the_default_ports(n: int, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, ports_from(8500), Path("consul"))
    rendered = json.loads((cluster.render(n) / "server.json").read_text())
    assert rendered == json.loads((CONFIG / f"server-{n}" / "server.json").read_text())


def test_the_file_of_the_service_that_is_not_ours_holds_its_default_port(tmp_path: Path) -> None:
    rendered = Cluster(tmp_path, ports_from(8500), Path("consul")).render_abacus(8500 + ABACUS)
    assert json.loads(rendered.read_text()) == json.loads((CONFIG / "abacus.json").read_text())


def test_servers_start_by_hand(tmp_path: Path, cluster: Cluster) -> None:
    """As the files are, but for the ports, which are taken wherever `make up` runs."""
    cluster.stop_server(3)
    folder = tmp_path / "server-3"
    shutil.copytree(cluster.render(3), folder)
    command = [str(cluster.binary), "agent", "-config-file", str(CONFIG / "common.json"), "-config-dir", str(folder)]
    with subprocess.Popen(
        [*command, "-data-dir", str(cluster.run / "data" / "consul-3")], stdout=subprocess.DEVNULL
    ) as by_hand:
        try:
            cluster._until(30, lambda: cluster._answering(3))
        finally:
            by_hand.kill()
