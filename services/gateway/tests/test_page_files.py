"""The page's files: what is not ours is unchanged, and nothing is fetched from elsewhere."""

import hashlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "page"
VENDOR = PAGE / "vendor"
OURS = sorted(each for each in PAGE.iterdir() if each.is_file())


def test_what_is_not_ours_is_unchanged() -> None:
    told = dict(re.findall(r"sha256 ([0-9a-f]{64})  (\S+)", (VENDOR / "README.md").read_text()))
    found = {hashlib.sha256(each.read_bytes()).hexdigest(): each.name for each in VENDOR.glob("*.mjs")}
    assert found == told != {}


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_nothing_is_fetched_from_elsewhere(file: Path) -> None:
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`)]*", file.read_text())
    explained = {"//html.spec.whatwg.org/multipage/server-sent-events.html,", "//www.w3.org/2000/svg"}
    assert {each.removeprefix("https:").removeprefix("http:") for each in addresses} <= explained


@pytest.mark.parametrize("file", [each for each in OURS if each.suffix == ".html"], ids=lambda file: file.name)
def test_pages_keep_to_their_security_policy(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
