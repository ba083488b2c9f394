"""What tests of `rollcall new` need: somewhere to make things, and the library as it would be published."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 250.0
"""Most that one command may take; a cold machine downloads what is needed meanwhile."""
NOT_COPIED = (".git", ".venv", ".run", "dist", "*_cache", "__pycache__", ".hypothesis")
WITHIN = ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTEST_ADDOPTS")
OUTSIDE = {key: value for key, value in os.environ.items() if key not in WITHIN}
"""The environment, but for what says in which environment and by which make the tests are run, and how."""


def copy(folder: Path) -> Path:
    """Return a copy of this repository, in which things may be made, with what is installed here."""
    target = folder / "rollcall"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    (target / ".venv").symlink_to(ROOT / ".venv")
    return target


def wheel(folder: Path) -> Path:
    """Build the library's wheel into a folder, and return that."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True, timeout=SECONDS)
    return folder


def run(*command: str, cwd: Path, **env: str) -> str:
    """Run a command that is to end well; return what it prints."""
    done = subprocess.run(
        command, cwd=cwd, env={**OUTSIDE, **env}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def new(folder: Path, *arguments: str) -> str:
    """Run `rollcall new` in a folder; return what it prints."""
    return run(sys.executable, "-m", "rollcall", "new", *arguments, cwd=folder, PYTHONPATH=str(ROOT))
