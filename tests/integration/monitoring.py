"""A real Prometheus for tests, with the chart's rules: found on this machine or installed, and told whom to scrape."""

import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import process
from deploy.local.guard import Guard
from tests import debian
from tests.integration.fleet import ROOT
from tests.waiting import eventually, free_port

FILES = ROOT / "deploy/helm/rollcall/files"
RULES, RULES_TEST, DASHBOARD = FILES / "rules.yaml", FILES / "rules_test.yaml", FILES / "dashboard.json"
START_SECONDS = 30
STOP_SECONDS = 10


@dataclass(frozen=True)
class Target:
    """Who is scraped, under the labels that the chart gives."""

    job: str
    service: str
    pod: str
    address: str


class Prometheus:
    """A server on a loopback port, which looks at its targets and at the rules each second."""

    def __init__(self, run: Path, guard: Guard, targets: Iterable[Target]) -> None:
        self._run, self._guard = run, guard
        self._program = program("prometheus")
        self._process: process.Process | None = None
        self._address = f"127.0.0.1:{free_port()}"
        self._http = httpx.Client(base_url=f"http://{self._address}", timeout=10, trust_env=False)
        self._config = run / "prometheus.json"  # which is YAML as well
        self._config.write_text(json.dumps(_config(list(targets)), indent=2))

    def start(self) -> None:
        """Start it, and wait until it has looked at every target and every rule."""
        command = [
            self._program,
            f"--config.file={self._config}",
            f"--storage.tsdb.path={self._run / 'prometheus'}",
            f"--web.listen-address={self._address}",
        ]
        self._process = process.start("prometheus", command, run=self._run)
        self._guard.watch(self._process.pid)
        eventually("Prometheus has looked at everything", self._has_looked, START_SECONDS)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what an expression finds now, each with its labels and its value; not what is no number."""
        found = self._get("query", query=expression)["result"]
        return [each for each in found if each["value"][1] != "NaN"]

    def rules(self) -> list[dict[str, Any]]:
        """Return the rules, as they are loaded."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """Return the alerts of this name that are pending or firing."""
        return [each for each in self._get("alerts")["alerts"] if each["labels"]["alertname"] == name]

    def close(self) -> None:
        """Stop it."""
        self._http.close()
        if self._process:
            self._process.stop(STOP_SECONDS)

    def _get(self, path: str, **parameters: str) -> Any:
        found = self._http.get(f"/api/v1/{path}", params=parameters).json()
        assert found["status"] == "success", f"{path} {parameters}: {found['error']}"
        return found["data"]

    def _has_looked(self) -> bool:
        assert self._process
        assert self._process.running(), f"Prometheus ended:\n{self._process.tail()}"
        try:
            if not self._http.get("/-/ready").is_success:
                return False
        except httpx.TransportError:
            return False
        targets = self._get("targets", state="active")["activeTargets"]
        return {each["health"] for each in (*targets, *self.rules())} == {"up", "ok"}


def _config(targets: list[Target]) -> dict[str, Any]:
    def scraped(job: str) -> list[dict[str, Any]]:
        return [
            {"targets": [each.address], "labels": {"service": each.service, "pod": each.pod}}
            for each in targets
            if each.job == job
        ]

    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "rollcall", "static_configs": scraped("rollcall")},
            {
                "job_name": "consul",
                "metrics_path": "/v1/agent/metrics",
                "params": {"format": ["prometheus"]},
                "static_configs": scraped("consul"),
            },
        ],
    }


def promtool(*arguments: str) -> None:
    """Run promtool; fails with what it says when it finds something wrong."""
    command = [program("promtool"), *arguments]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def program(name: str) -> str:
    """Return where a program of Prometheus is; installs Debian's package if need and may be, else skips the test."""
    found = shutil.which(name)
    if not found:
        debian.install("prometheus")
        found = shutil.which(name)
    if not found:
        pytest.skip(
            f"no {name}: it is not on PATH, and could not be installed here as a part of Debian's package prometheus: "
            "install Prometheus, or put its programs on PATH"
        )
    return found
