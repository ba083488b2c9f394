"""Builds the Go programs of this folder: the other side in the tests of compatibility, and in the benchmark."""

import hashlib
from pathlib import Path

from deploy.local import gotools

MODULE = Path(__file__).parent


def program(name: str) -> Path:
    """Return the program of this name, `client` or `server`, built when its source has changed.

    Raises `LocalError` where there is no Go and none can be had.
    """
    sources = sorted([MODULE / "go.mod", *MODULE.rglob("*.go")])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    built = gotools.cache_dir() / f"gojsonrpc-{name}-{digest}"
    gotools.build(MODULE, f"./{name}", built)
    return built
