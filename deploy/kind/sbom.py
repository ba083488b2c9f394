"""What is in an image: Debian's and Python's packages, as the image itself tells, in CycloneDX's form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from deploy.kind.cluster import run

if TYPE_CHECKING:
    from pathlib import Path

ASK = """
import importlib.metadata, json, pathlib
status = pathlib.Path("/var/lib/dpkg/status").read_text()
debian = [dict(line.split(": ", 1) for line in each.splitlines() if line.startswith(("Package: ", "Version: ")))
          for each in status.split("\\n\\n") if "Status: install ok installed" in each]
python = [{"Package": each.name, "Version": each.version} for each in importlib.metadata.distributions()]
print(json.dumps({"deb": debian, "pypi": python}))
"""
"""Asks from within: an image has neither a shell script nor a tool for this, but it has Python."""


def write(image: str, folder: Path) -> Path:
    """Write the bill of materials of an image into a folder; return the file."""
    command = ["docker", "run", "--rm", "--network=none", "--read-only", "--entrypoint", "/opt/rollcall/bin/python"]
    found = json.loads(run([*command, image, "-c", ASK]))
    bom = Bom()
    name, _, tag = image.rpartition(":")
    bom.metadata.component = Component(name=name, version=tag, type=ComponentType.CONTAINER, bom_ref=image)
    for kind, packages in found.items():
        for package in packages:
            namespace = "debian" if kind == "deb" else None
            url = PackageURL(kind, namespace, package["Package"], package["Version"])
            bom.components.add(
                Component(
                    name=package["Package"],
                    version=package["Version"],
                    type=ComponentType.LIBRARY,
                    purl=url,
                    bom_ref=str(url),
                )
            )
    bom.register_dependency(bom.metadata.component, bom.components)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.replace('/', '-')}-{tag}.cdx.json"
    file.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n")
    return file
