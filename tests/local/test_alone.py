"""Each service can be installed and run by itself: its folder, its requirements, the library and the contracts."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/__main__.py"))


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
def test_a_service_alone(name: str, python: Callable[[str], Path], tmp_path: Path) -> None:
    for needed in ("rollcall", "contracts", f"services/{name}"):
        shutil.copytree(ROOT / needed, tmp_path / needed)
    command = [str(python(name)), "-m", f"services.{name}", "--help"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "--consul" in ran.stdout
