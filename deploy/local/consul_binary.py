"""Get a Consul binary: one that is installed, a cached one, HashiCorp's release, or one built from the Go module."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import requests

from deploy.local import LocalError, gotools
from deploy.local.lock import locked
from deploy.local.progress import Progress, say

VERSION = "1.22.5"
MINIMUM = (1, 20)
RELEASES = "https://releases.hashicorp.com"
MODULE = Path(__file__).parent / "build"
PACKAGE = "github.com/hashicorp/consul"

ASK_SECONDS = 10.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 15.0
DOWNLOAD_SECONDS = 600.0
SUMS_BYTES = 100_000
ZIP_BYTES = 300_000_000
BINARY_BYTES = 600_000_000
CHUNK_BYTES = 1 << 14  # small, so that the time is looked at often on a slow line

MACHINES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


class DownloadError(Exception):
    """The release could not be had; not an error for the user, as it can be built."""


def consul_binary() -> Path:
    """Return a Consul binary of version 1.20 or newer, getting one if need be.

    In this order: CONSUL_BIN, `consul` on PATH, the cache, HashiCorp's release (from CONSUL_RELEASES, if that is set)
    with its checksum verified, and a build of the Go module pinned in deploy/local/build. Raises LocalError when
    CONSUL_BIN will not do, when a checksum is wrong, or when the build fails.
    """
    if chosen := os.environ.get("CONSUL_BIN"):
        return _chosen(chosen)
    if found := shutil.which("consul"):
        version = consul_version(Path(found))
        if version >= MINIMUM:
            return Path(found)
        say(f"{found} is Consul {_dotted(version)}, but {_dotted(MINIMUM)} or newer is needed: not using it")
    cached = gotools.cache_dir() / f"consul-{VERSION}"
    with locked(cached.with_name(f"{cached.name}-get.lock"), "another download or build of Consul", 3600):
        if not cached.exists():
            try:
                _download(cached)
            except DownloadError as error:
                say(f"{error}: building Consul {VERSION} from source instead")
                gotools.build(MODULE, PACKAGE, cached)
    if not consul_version(cached):
        raise LocalError(f"{cached} should answer 'consul version', but does not: remove it and run this again")
    return cached


def consul_version(binary: Path) -> tuple[int, ...]:
    """Return the version a binary says it is; () if it does not run or says something else."""
    try:
        said = subprocess.run(
            [binary, "version"], capture_output=True, text=True, timeout=ASK_SECONDS, check=False, errors="replace"
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.match(r"Consul v(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, match.groups())) if match else ()


def _chosen(setting: str) -> Path:
    binary = Path(setting).expanduser()
    expected = f"CONSUL_BIN should name a Consul binary of version {_dotted(MINIMUM)} or newer, but {setting}"
    if not binary.is_file():
        raise LocalError(f"{expected} is not a file: correct it, or unset it to have one downloaded or built")
    version = consul_version(binary)
    if not version:
        raise LocalError(f"{expected} does not answer 'consul version': correct it, or unset it")
    if version < MINIMUM:
        raise LocalError(f"{expected} is {_dotted(version)}: correct it, or unset it to have one downloaded or built")
    return binary.absolute()


def _download(target: Path) -> None:
    system, machine = platform.system().lower(), MACHINES.get(platform.machine().lower(), platform.machine())
    name = f"consul_{VERSION}_{system}_{machine}.zip"
    base = f"{(os.environ.get('CONSUL_RELEASES') or RELEASES).rstrip('/')}/consul/{VERSION}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".consul-") as folder:
        sums, archive, binary = Path(folder) / "sums", Path(folder) / name, Path(folder) / "consul"
        _fetch(f"{base}/consul_{VERSION}_SHA256SUMS", sums, SUMS_BYTES)
        lines = [line.split() for line in sums.read_text(errors="replace").splitlines()]
        expected = next((line[0] for line in lines if line[1:] == [name]), None)
        if not expected:
            raise DownloadError(f"{base} has no Consul for {system}/{machine}")
        found = _fetch(f"{base}/{name}", archive, ZIP_BYTES)
        if found != expected:
            raise LocalError(
                f"{base}/{name} should have the SHA-256 {expected}, but has {found}: it is not what was released, "
                "so find out why, or set CONSUL_BIN to a binary you trust"
            )
        _unpack(archive, binary)
        if consul_version(binary) < MINIMUM:
            raise LocalError(f"{base}/{name} should hold a Consul that runs here, but does not: set CONSUL_BIN")
        binary.replace(target)
    say(f"downloaded {target}")


def _fetch(url: str, target: Path, limit: int) -> str:
    """Download to a file and return its SHA-256; raises DownloadError, also for more than `limit` bytes."""
    digest, size, deadline = hashlib.sha256(), 0, time.monotonic() + DOWNLOAD_SECONDS
    try:
        with (
            Progress(f"downloading {url}") as progress,
            requests.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response,
            target.open("wb") as file,
        ):
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0))
            for chunk in response.iter_content(CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise DownloadError(f"{url} is larger than the {limit} bytes expected at most")
                if time.monotonic() > deadline:
                    raise DownloadError(f"{url} took longer than {DOWNLOAD_SECONDS:g} s")
                digest.update(chunk)
                file.write(chunk)
                progress(f"{size / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{size / 1e6:.0f} MB")
            if size < total:
                raise DownloadError(f"{url} ended after {size} of {total} bytes")
    except requests.HTTPError as error:
        raise DownloadError(f"{url} answered {error.response.status_code}") from error
    except requests.RequestException as error:
        raise DownloadError(f"{url} cannot be reached ({type(error).__name__})") from error
    return digest.hexdigest()


def _unpack(archive: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as content:
            if content.getinfo("consul").file_size > BINARY_BYTES:
                raise LocalError(f"{archive.name} should hold at most {BINARY_BYTES} bytes: set CONSUL_BIN instead")
            with content.open("consul") as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LocalError(f"{archive.name} should be a zip file with a file 'consul' in it, but is not") from error
    target.chmod(0o755)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "of an unknown version"
