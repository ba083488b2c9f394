"""Debian's packages, for tests that need a program which may not be there."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from deploy.local.lock import locked
from deploy.local.progress import Progress

INSTALL_SECONDS = 600


def install(package: str) -> None:
    """Install a package where there is apt-get, and it can be called without a password; else do nothing."""
    if not (apt := _apt()):
        return
    # Tests run side by side, and apt-get does not wait for another one.
    with (
        locked(Path(tempfile.gettempdir()) / "rollcall-apt.lock", "another installation", INSTALL_SECONDS),
        Progress(f"installing {package} for the tests") as progress,
    ):
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", package]):
            progress(" ".join(arguments))
            subprocess.run([*apt, *arguments], stdin=subprocess.DEVNULL, timeout=INSTALL_SECONDS, check=False)


def _apt() -> list[str]:
    """Return the command that installs packages; nothing where there is none, or it is not ours to call."""
    if not shutil.which("apt-get"):
        return []
    # RUNLEVEL: a package must not start a server of its own.
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "--quiet", "--quiet"]
    if os.getuid() == 0:
        return command
    sudo = ["sudo", "-n"]
    able = shutil.which("sudo") and subprocess.run([*sudo, "true"], capture_output=True, timeout=10, check=False)
    return [*sudo, *command] if able and able.returncode == 0 else []
