"""`python -m deploy.kind`: the images, and the whole topology on a kind cluster, to play with."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import closing
from pathlib import Path

from deploy.kind import cluster as tools
from deploy.kind import sbom
from deploy.kind.cluster import CHART, ROOT, Kind
from deploy.local import LocalError, process
from deploy.local.lock import locked
from deploy.local.progress import Progress, say

NAMESPACE = RELEASE = "rollcall"
LOCK_SECONDS = 1200.0
FORWARDED = {"gateway": ("service/rollcall-gateway", 8541, 80), "consul-ui": ("service/rollcall-consul-ui", 8500, 8500)}
"""What is forwarded: from which local port, to which of a Service's."""


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.kind", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up_parser = commands.add_parser("up", help="create the cluster, install the chart, forward its ports")
    up_parser.add_argument("--small", action="store_true", help="one node, one instance of each service")
    commands.add_parser("down", help="delete the cluster, and stop forwarding")
    commands.add_parser("images", help="build an image of each service, tagged with the chart's version")
    commands.add_parser("sbom", help="write what is in each of them to dist/, as CycloneDX")
    arguments = parser.parse_args()
    run = Path(os.environ.get("ROLLCALL_RUN") or ROOT / ".run").expanduser().resolve() / "kind"
    name = os.environ.get("KIND_NAME") or "rollcall"
    config = ROOT / f"deploy/kind/cluster{'-small' if getattr(arguments, 'small', False) else ''}.yaml"
    try:
        if arguments.command == "images":
            print("\n".join(tools.build(tools.version())))
            return 0
        if arguments.command == "sbom":
            for image in tools.images(tools.version()):
                print(sbom.write(image, ROOT / "dist").relative_to(ROOT))
            return 0
        tools.need_tools()
        with locked(run / "lock", "another 'make kind-up' or 'make kind-down'", LOCK_SECONDS):
            if arguments.command == "up":
                up(Kind(name, config=config), run, small=arguments.small)
            else:
                down(Kind(name), run)
    except LocalError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: make kind-up goes on from here, make kind-down removes what there is")
        return 130
    return 0


def up(kind: Kind, run: Path, *, small: bool) -> None:
    """Bring everything up to what the working tree says; the same again changes nothing."""
    _refuse_taken_ports(run)
    tag = tools.version()
    images = tools.build(tag)
    consul = tools.consul_image()
    with Progress("bringing up the cluster") as progress:
        if not kind.exists():
            progress(f"creating {kind.name} (a minute)")
            kind.create()
        progress("loading images")
        kind.load(*images, consul)
        progress("installing the chart")
        flags = ["--set", "image.pullPolicy=Never", *(["--values", str(CHART / "ci/dev-values.yaml")] if small else [])]
        for image in images:  # the tag is always the same: what tells a pod to start anew is what the image is
            digest = tools.run(["docker", "image", "inspect", "--format", "{{.Id}}", image]).strip()
            flags += ["--set-string", f"services.{tools.service_of(image)}.podAnnotations.image={digest}"]
        command = ["upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--create-namespace"]
        kind.helm(*command, *flags, "--wait", "--timeout", "8m")
    for what, (service, local, remote) in FORWARDED.items():
        if not process.running(run, what):
            arguments = [f"kind-{kind.name}", NAMESPACE, service, f"{local}:{remote}"]
            process.start(what, [sys.executable, "-m", "deploy.kind.forward", *arguments], run=run, cwd=ROOT)
    print(kind.kubectl("--namespace", NAMESPACE, "get", "pods", "--output", "wide"))
    print(kind.helm("test", RELEASE, "--namespace", NAMESPACE, "--logs").partition("(calls)\n")[2].rstrip())
    print(f"\nThe gateway's page: http://localhost:{FORWARDED['gateway'][1]}/")
    print(f"Consul's web page:  http://localhost:{FORWARDED['consul-ui'][1]}/ui")
    print(f"Next: kubectl --context kind-{kind.name} -n {NAMESPACE} get pods; make kind-down (remove it all)")


def down(kind: Kind, run: Path) -> None:
    """Remove what `up` has made."""
    for what in FORWARDED:
        if found := process.running(run, what):
            found.stop(5)
        process.forget(run, what)
    there = kind.exists()
    kind.delete()
    print(f"deleted the cluster {kind.name}" if there else "there was no cluster")


def _refuse_taken_ports(run: Path) -> None:
    for what, (_, local, _) in FORWARDED.items():
        if process.running(run, what):
            continue
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", local))
            except OSError:
                raise LocalError(
                    f"expected port {local} to be free, to forward it to {what}: stop what has it (make down?)"
                ) from None


if __name__ == "__main__":
    sys.exit(main())
