"""docs/your-own-service.md: what is to be typed, and what it shows below each command."""

import re
from dataclasses import dataclass

from tests.making import ROOT

PAGE, ON_KUBERNETES, REST = re.split(
    r"(## On Kubernetes\n.*?)(?=\n## )", (ROOT / "docs/your-own-service.md").read_text(), flags=re.DOTALL
)


@dataclass(frozen=True)
class Typed:
    command: str
    shown: list[str]

    def is_answered_by(self, printed: str) -> bool:
        return [alike(line) for line in printed.splitlines()] == [alike(line) for line in self.shown]


def alike(line: str) -> str:
    """Leave out what is another each time: ports, how long it took, and how wide columns are."""
    for pattern, instead in (
        (r"127\.0\.0\.1:\d+", "ADDRESS:PORT"),
        (r"\d+ ms", "TIME"),
        (r"in \d+\.\d+s", "in TIME"),
        (r"from \d+ protos", "from N protos"),
        (r" {2,}", "  "),
    ):
        line = re.sub(pattern, instead, line)
    return line


def typed(page: str) -> list[Typed]:
    """Return what is to be typed, and what is shown below each."""
    found = []
    for block in re.findall(r"```console\n([^`]*)```", page):
        for each in re.findall(r"^\$ (.*\n(?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            command, *shown = each.splitlines()
            found.append(Typed(command, shown))
    return found
