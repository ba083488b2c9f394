"""The images: small, with nothing in them but what a service needs, and willing to stop."""

import json
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy.kind import cluster as tools
from deploy.kind import sbom
from deploy.kind.cluster import run
from deploy.local import LocalError
from tests import making
from tests.waiting import eventually

MOST = 1.3  # times what the base image and the wheels weigh
WHEELS = """
import importlib.metadata
files = [file for each in importlib.metadata.distributions() for file in each.files]
print(sum(file.size or 0 for file in files if file.suffix != ".pyc"))
"""
LOOK = """
import json, os
print(json.dumps([os.getuid(), os.getgid(), os.listdir("/app/services"), os.listdir("/app/contracts")]))
"""
PYTHON = "/opt/rollcall/bin/python"
TAG = "test"
SERVICES = [tools.service_of(image) for image in tools.images(TAG)]
EACH = pytest.mark.parametrize("service", SERVICES)


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    try:
        tools.need_tools()
        return dict(zip(SERVICES, tools.build(TAG), strict=True))
    except LocalError as error:
        pytest.fail(str(error))


def inside(image: str, program: str, *arguments: str) -> str:
    """Run something in the image, as Kubernetes would: with no network here, and nothing to write to."""
    flags = ["--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--entrypoint", program]
    return run(["docker", "run", *flags, image, *arguments])


def size(image: str) -> int:
    return int(run(["docker", "image", "inspect", "--format", "{{.Size}}", image]))


@EACH
def test_it_is_little_more_than_its_base_and_its_wheels(images: dict[str, str], service: str) -> None:
    base = run(
        [
            "docker",
            "image",
            "inspect",
            "--format",
            '{{index .Config.Labels "org.opencontainers.image.base.name"}}',
            images[service],
        ]
    )
    wheels = int(inside(images[service], PYTHON, "-c", WHEELS))
    assert wheels > 30_000_000
    assert size(images[service]) <= MOST * (size(base.strip()) + wheels)


@EACH
def test_it_has_what_it_needs_and_no_more(images: dict[str, str], service: str) -> None:
    uid, gid, services, contracts = json.loads(inside(images[service], PYTHON, "-c", LOOK))
    assert (uid, gid) == (10001, 10001)
    assert services == [service]
    called = {"student": {"student", "sum"}, "gateway": set[str]()}.get(service, {service})
    assert {each for each in contracts if not each.startswith("__")} == called
    for module in ("pip", "ensurepip._bundled", "pytest", "grpc_tools", f"services.{service}.tests"):
        with pytest.raises(LocalError, match="No module named"):
            inside(images[service], PYTHON, "-c", f"import {module}")
    for program in ("gcc", "cc", "pip", "curl", "git"):
        with pytest.raises(LocalError, match="not found"):
            inside(images[service], program)


@EACH
def test_it_says_what_it_is(images: dict[str, str], service: str) -> None:
    labels = json.loads(run(["docker", "image", "inspect", "--format", "{{json .Config.Labels}}", images[service]]))
    assert labels["org.opencontainers.image.title"] == f"rollcall-{service}"
    assert labels["org.opencontainers.image.version"] == TAG
    assert labels["org.opencontainers.image.revision"] == tools.revision()
    assert f"usage: {service}" in inside(images[service], "/app/serve", "--help")


@contextmanager
def started(image: str) -> Iterator[str]:
    name = f"rollcall-test-{secrets.token_hex(4)}"
    flags = ["--detach", "--name", name, "--network=none", "--read-only", "--tmpfs=/data:uid=10001", "--cap-drop=ALL"]
    run(["docker", "run", *flags, "--env=ROLLCALL_DATABASE=sqlite:////data/student.db", image])
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=False, timeout=60)


@EACH
def test_sigterm_arrives_and_ends_it_well(images: dict[str, str], service: str) -> None:
    with started(images[service]) as name:

        def said(what: str) -> bool:
            done = subprocess.run(
                ["docker", "logs", name], capture_output=True, encoding="utf-8", timeout=30, check=True
            )
            return what in done.stdout + done.stderr

        # There is no Consul here, which it waits for; the gateway does so before it serves.
        eventually(
            "it is up",
            lambda: said("no Consul server could be asked" if service == "gateway" else "is not registered"),
            60,
        )
        run(["docker", "stop", "--time", "30", name])
        state = json.loads(run(["docker", "inspect", "--format", "{{json .State}}", name]))
        assert state["ExitCode"] == 0, "killed, if 137"


def test_what_is_in_it_is_written_down(images: dict[str, str], tmp_path: Path) -> None:
    file = sbom.write(images["student"], tmp_path)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read_text()) is None
    packages = {each["purl"] for each in json.loads(file.read_text())["components"]}
    for beginning in ("pkg:deb/debian/libc6@", "pkg:pypi/grpcio@", "pkg:pypi/sqlalchemy@"):
        assert [each for each in packages if each.startswith(beginning)], beginning
    assert not [each for each in packages if each.startswith("pkg:pypi/pip@")]


@pytest.mark.parametrize("kind", ["srv", "web"])
@pytest.mark.usefixtures("images")  # for the tools that they need
def test_of_a_service_that_was_made_alone(tmp_path: Path, kind: str) -> None:
    making.new(tmp_path, "shop", "--type", kind)
    making.wheel(tmp_path / "shop/wheels")
    making.run("make", "image", cwd=tmp_path / "shop")
    try:
        said = inside("shop:0.1.0", "/opt/app/bin/python", "-m", "shop", "--help")
        assert {"srv": "--most", "web": "--longest-name"}[kind] in said
        assert inside("shop:0.1.0", "id", "-u").strip() == "10001"
    finally:
        run(["docker", "image", "rm", "--force", "shop:0.1.0"])
