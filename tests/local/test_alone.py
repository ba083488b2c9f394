"""Each service can be installed and run by itself: its folder, its requirements, the library and the contracts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.cluster import Cluster
from deploy.local.guard import Guard
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/__main__.py"))
SECONDS = 30  # to start, and to end


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the Python of a new environment with what a service requires; services that require the same share one."""
    made: dict[str, Path] = {}

    def python(name: str) -> Path:
        requirements = ROOT / "services" / name / "requirements.txt"
        text = requirements.read_text()
        if text not in made:
            environment = tmp_path_factory.mktemp("environment")
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            made[text] = environment / "bin" / "python"
            install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--require-hashes", "-r"]
            subprocess.run([made[text], *install, requirements], check=True, timeout=250)
        return made[text]

    return python


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_alone(
    name: str, python: Callable[[str], Path], tmp_path: Path, cluster: Cluster, guard: Guard
) -> None:
    """It starts, passes its check and ends when told to, with every setting but Consul's address at its default."""
    for needed in ("rollcall", "contracts", f"services/{name}"):
        shutil.copytree(ROOT / needed, tmp_path / needed)
    log = tmp_path / "log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            [str(python(name)), "-m", f"services.{name}", "--consul", ",".join(cluster.addresses)],
            cwd=tmp_path,
            env={key: value for key, value in os.environ.items() if not key.startswith("ROLLCALL_")},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    guard.watch(started.pid)

    def passes() -> bool:
        assert started.poll() is None, log.read_text()
        return bool(cluster.get(f"/v1/health/service/{name}?passing"))

    try:
        eventually(f"{name} passes", passes, SECONDS)
        started.terminate()
        assert started.wait(SECONDS) == 0, log.read_text()
    finally:
        started.kill()
