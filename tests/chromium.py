"""A real browser for tests of web pages, and a picture of the page for the README:

python -m tests.chromium http://127.0.0.1:8541 docs/page.png
"""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import requests
from playwright.sync_api import Browser, BrowserType, Error, ViewportSize, sync_playwright

from tests import debian

ARGUMENTS = (
    "--no-sandbox",  # which root may not have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = ViewportSize(width=1280, height=800), ViewportSize(width=360, height=740)
DOWNLOAD_SECONDS = 300
BESIDES = {
    "greeter/Call": {"name": "李白"},
    "hello/HelloWorld": "李白",
    "student/AddFunc": {"name": "李白", "age": 33, "score": [90, 85, 77]},
}
"""What else is called while the picture is taken."""


@contextmanager
def running() -> Iterator[Browser]:
    """Yield a headless Chromium: one that is there, or Debian's, or the one that Playwright downloads; else skip."""
    with sync_playwright() as playwright:
        browser = _launched(playwright.chromium)
        try:
            yield browser
        finally:
            browser.close()


def _launched(chromium: BrowserType) -> Browser:
    path = _installed()
    if not path and not Path(chromium.executable_path).exists():
        debian.install("chromium")
        path = _installed()
        if not path:
            download = [sys.executable, "-m", "playwright", "install", "chromium"]
            subprocess.run(download, timeout=DOWNLOAD_SECONDS, check=False)
    try:
        return chromium.launch(executable_path=path, args=ARGUMENTS)
    except Error as error:
        pytest.skip(f"expected Chromium, found none that runs; apt-get install chromium. {error}")


def _installed() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _picture(url: str, target: Path) -> None:
    """Take a picture of the page at work."""
    over = threading.Event()
    for path, message in BESIDES.items():
        threading.Thread(target=_call, args=(f"{url}/v1/{path}", message, over), daemon=True).start()
    with running() as browser:
        page = browser.new_page(viewport=ViewportSize(width=1280, height=1200), color_scheme="light")
        page.goto(f"{url}/#sum.Add")
        page.get_by_label("num1").fill("333")
        page.get_by_label("num2").fill("666")
        page.wait_for_timeout(30_000)  # until there is something to see in the curves
        page.get_by_role("button", name="Send 1,000 calls").click()
        page.get_by_text("1,000 calls, none failed").wait_for(timeout=200_000)
        page.mouse.move(0, 0)
        page.screenshot(path=target, full_page=True)
    over.set()


def _call(url: str, message: object, over: threading.Event) -> None:
    """Call now and then, sometimes more often."""
    for turn in count():
        requests.post(url, json=message, timeout=10)
        if over.wait(0.03 + 0.1 * (turn // 60 % 2)):
            return


if __name__ == "__main__":
    _picture(sys.argv[1], Path(sys.argv[2]))
