"""`python -m deploy.k8s`: render deploy/k8s/base, and the table of values in docs/, from the chart."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import yaml

from deploy.kind.cluster import CHART, ROOT, run
from deploy.local import LocalError
from deploy.local.progress import say

BASE = Path(__file__).parent / "base/rollcall.yaml"
TABLE = ROOT / "docs/values.md"
HEAD = "# Rendered from deploy/helm/rollcall by `make manifests`: change it there.\n"
# The overlay for production brings the key of the gossip; none may be in a file that is kept.
FLAGS = ("--set=consul.gossip.create=false", "--skip-tests")
# What is Helm's alone, with the annotations that consist of nothing else.
_KEEP = re.compile(r"^ *annotations:\n *helm\.sh/resource-policy: keep\n", re.MULTILINE)
_HELM = re.compile(r"^ *(app\.kubernetes\.io/managed-by|helm\.sh/chart|# Source): .*\n", re.MULTILINE)


def rendered() -> str:
    """Return the chart with its defaults, as plain manifests."""
    return HEAD + _HELM.sub("", _KEEP.sub("", run(["helm", "template", "rollcall", str(CHART), *FLAGS])))


def table() -> str:
    """Return the chart's values as a table: each with its default and the comment above it."""
    text = (CHART / "values.yaml").read_text()
    lines = text.splitlines()
    rows = ["| value | default | what it is |", "| --- | --- | --- |"]

    def walk(node: yaml.MappingNode, path: str) -> None:
        for key, value in node.value:
            name, comment = f"{path}{key.value}", _above(lines, key.start_mark.line)
            count = len(rows)
            if isinstance(value, yaml.MappingNode) and not value.flow_style and name != "services":
                walk(value, f"{name}.")
            if comment and len(rows) == count:
                shown = "by service, see the file" if name == "services" else f"`{_flow(value)}`"
                rows.append(f"| `{name}` | {shown} | {comment} |")

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        walk(root, "")
    return "\n".join(rows) + "\n"


def _above(lines: list[str], number: int) -> str:
    """Return the comment that ends above a line."""
    found: list[str] = []
    while number and (line := lines[number - 1].strip()).startswith("#"):
        found.insert(0, line.removeprefix("#").strip())
        number -= 1
    return " ".join(found)


def _flow(node: yaml.Node) -> str:
    """Return a value on one line."""
    value = yaml.safe_load(yaml.serialize(node))
    return json.dumps(value, ensure_ascii=False)


def main() -> int:
    """Write what is rendered anew."""
    try:
        BASE.write_text(rendered())
        before, _, _ = TABLE.read_text().partition("| value | default |")
        TABLE.write_text(before + table())
    except LocalError as error:
        say(f"error: {error}")
        return 1
    for written in (BASE, TABLE):
        print(f"{written.relative_to(ROOT)}: rendered from the chart")
    return 0


if __name__ == "__main__":
    sys.exit(main())
