"""A kind cluster, and the commands that work on it: each said when it fails, with what it has printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deploy.local import LocalError
from deploy.local.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/rollcall"
NODE_IMAGE = "kindest/node:v1.34.3"
"""Named, as kind's own default carries a digest, which only a registry can give. KIND_NODE_IMAGE sets another."""

TOOLS = {
    "docker": "https://docs.docker.com/engine/install",
    "kind": "https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "helm": "https://helm.sh/docs/intro/install",
}
SECONDS = 600.0
"""Most seconds that one command may take."""


def need_tools() -> None:
    """Raise LocalError naming the tools that are not there, and how to get them."""
    missing = [f"{tool} ({how})" for tool, how in TOOLS.items() if not shutil.which(tool)]
    if missing:
        raise LocalError(f"expected {', '.join(TOOLS)} on PATH; not found: {', '.join(missing)}")
    if subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode:
        raise LocalError("expected a Docker engine, found none that answers `docker info`: start it, or install one")


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, seconds: float = SECONDS, stdin: str = ""
) -> str:
    """Run a command to its end and return what it has printed; LocalError with that if it fails or takes too long."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            list(command),
            input=stdin,
            env=None if env is None else {**os.environ, **env},
            cwd=ROOT,
            capture_output=True,
            encoding="utf-8",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        how = f": {TOOLS[command[0]]}" if command[0] in TOOLS else ""
        raise LocalError(f"expected {command[0]} on PATH, found none: install it{how}") from None
    except subprocess.TimeoutExpired as error:
        raise LocalError(
            f"{shown}: not done after {seconds:g} s; it has said: {error.stdout!r} {error.stderr!r}"
        ) from None
    if done.returncode:
        raise LocalError(f"{shown}: failed ({done.returncode})\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


@dataclass(frozen=True, slots=True)
class Kind:
    """One cluster, by its name; with a kubeconfig of its own, or in the user's."""

    name: str
    kubeconfig: Path | None = None
    config: Path = ROOT / "deploy/kind/cluster.yaml"

    @property
    def env(self) -> dict[str, str]:
        """What kubectl and helm find the cluster by."""
        return {"KUBECONFIG": str(self.kubeconfig)} if self.kubeconfig else {}

    def exists(self) -> bool:
        """Whether kind knows of a cluster of this name."""
        return self.name in run(["kind", "get", "clusters"]).split()

    def create(self) -> None:
        """Create the cluster and wait until its nodes are ready; LocalError if one of its name is there."""
        image = os.environ.get("KIND_NODE_IMAGE") or NODE_IMAGE
        command = ["kind", "create", "cluster", "--name", self.name, "--config", str(self.config), "--image", image]
        run([*command, "--wait", "180s", *self._config_flag])

    def adopt(self) -> None:
        """Write the kubeconfig of a cluster that is there already."""
        run(["kind", "export", "kubeconfig", "--name", self.name, *self._config_flag])

    def delete(self) -> None:
        """Delete the cluster and all that is in it; harmless when it has gone."""
        run(["kind", "delete", "cluster", "--name", self.name, *self._config_flag])

    def load(self, *images: str) -> None:
        """Copy images from the Docker engine to every node that pods run on."""
        nodes = run(["kind", "get", "nodes", "--name", self.name]).split()
        working = [node for node in nodes if "control-plane" not in node] or nodes
        run(["kind", "load", "docker-image", "--name", self.name, "--nodes", ",".join(working), *images])

    def kubectl(self, *arguments: str, seconds: float = SECONDS, stdin: str = "") -> str:
        """Run kubectl on the cluster; return what it prints."""
        return run(
            ["kubectl", "--context", f"kind-{self.name}", *arguments], env=self.env, seconds=seconds, stdin=stdin
        )

    def get(self, *arguments: str) -> Any:
        """Return what `kubectl get ... -o json` finds."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def helm(self, *arguments: str, seconds: float = SECONDS) -> str:
        """Run helm on the cluster; return what it prints."""
        return run(["helm", "--kube-context", f"kind-{self.name}", *arguments], env=self.env, seconds=seconds)

    @property
    def _config_flag(self) -> list[str]:
        return ["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []


def images(tag: str) -> list[str]:
    """Return the names of the services' images under a tag."""
    folders = sorted(path.parent.name for path in (ROOT / "services").glob("*/__main__.py"))
    return [f"rollcall/{folder.replace('_', '-')}:{tag}" for folder in folders]


def service_of(image: str) -> str:
    """Return the service that one of these images is of."""
    return image.partition("/")[2].partition(":")[0]


def build(tag: str) -> list[str]:
    """Build the services' images; return their names."""
    built = images(tag)
    with Progress("building images") as progress:
        for image in built:
            progress(image)
            base = os.environ.get("PYTHON_IMAGE")
            arguments = {
                "SERVICE": service_of(image).replace("-", "_"),
                "VERSION": tag,
                "REVISION": revision(),
                **({"PYTHON_IMAGE": base} if base else {}),
            }
            flags = [f"--build-arg={name}={value}" for name, value in arguments.items()]
            run(["docker", "build", "--quiet", "--file", "Dockerfiles/service.Dockerfile", *flags, "--tag", image, "."])
    return built


def consul_image() -> str:
    """Return the image of Consul that the chart names; pulled, unless it is there."""
    image = str(yaml.safe_load((CHART / "values.yaml").read_text())["consul"]["image"])
    if not run(["docker", "images", "--quiet", image]).strip():
        say(f"pulling {image}")
        run(["docker", "pull", image])
    return image


def revision() -> str:
    """Return the commit that is checked out, if git knows."""
    try:
        return run(["git", "rev-parse", "HEAD"]).strip()
    except LocalError:
        return "unknown"


def version() -> str:
    """Return the version of the chart, which its images are tagged with unless they are told otherwise."""
    return str(yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"])
