"""Lines as a process writes them to its standard error."""

import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, logging, sys
from rollcall import logs
logs.configure(sys.argv[1], sys.argv[2], 'sum "1" 點')
log = logging.getLogger("rollcall.test")

async def work():
    logs.call("sum.v1.SumService/Add", "OK", 0.0012345, "4bf92f3577b34da6a3ce929d0e0e4736")
    log.info("quoted %r and\\nbroken", '"x"')
    log.debug("deep")
    try:
        raise ValueError("no good")
    except ValueError:
        log.exception("failed")
    logs.call("sum.v1.SumService/Add", "NOT_FOUND", 2.0, "4bf92f3577b34da6a3ce929d0e0e4736")

asyncio.run(work())
"""


def lines(form: str, level: str = "info") -> list[str]:
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, form, level]
    written = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", timeout=30)
    assert written.stdout == ""
    return written.stderr.splitlines()


def test_json_is_one_object_per_line() -> None:
    call, quoted, failed, last = (json.loads(line) for line in lines("json"))
    assert all(each["instance"] == 'sum "1" 點' for each in (call, quoted, failed, last))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["time"]) for each in (call, quoted, failed))
    assert (call["level"], call["message"], call["code"]) == ("INFO", "sum.v1.SumService/Add", "OK")
    assert (call["ms"], call["trace"]) == (1.23, "4bf92f3577b34da6a3ce929d0e0e4736")
    assert quoted["message"] == "quoted '\"x\"' and\nbroken"
    assert failed["level"] == "ERROR"
    assert "ValueError: no good" in failed["exception"]
    assert last["code"] == "NOT_FOUND"


def test_text() -> None:
    first, *_, last = lines("text")
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    pattern = (
        rf'{stamp} INFO sum "1" 點 sum\.v1\.SumService/Add code=OK ms=1\.23 trace=4bf92f3577b34da6a3ce929d0e0e4736'
    )
    assert re.fullmatch(pattern, first)
    assert "code=NOT_FOUND ms=2000.00" in last


def test_the_level_is_the_least_that_is_logged() -> None:
    assert any("deep" in line for line in lines("json", "debug"))
    (only,) = lines("json", "error")
    assert json.loads(only)["message"] == "failed"


BUSY = """
import asyncio, logging, threading
from rollcall import logs
logs.configure("json", "info", "sum-1")
log, over = logging.getLogger("rollcall.test"), threading.Event()

def chatter():
    while not over.is_set():
        log.info("hello")

async def work():
    threads = [threading.Thread(target=chatter) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(400):
        logs.call("sum.v1.SumService/Add", "OK", 0.001, "4bf92f3577b34da6a3ce929d0e0e4736")
        await asyncio.sleep(0.004)
    over.set()

asyncio.run(work())
"""


def test_threads_that_log_beside_the_event_loop_neither_stop_it_nor_lose_a_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", BUSY], check=True, stderr=log, timeout=60)
    messages = [json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines()]
    assert messages.count("sum.v1.SumService/Add") == 400
    assert "hello" in messages
