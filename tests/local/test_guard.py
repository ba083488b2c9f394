"""What a test session started goes with it, even when the session is killed."""

import subprocess
import sys
from pathlib import Path

import psutil

SESSION = """
import sys, time
from pathlib import Path
from deploy.local import process
from deploy.local.guard import Guard

guard = Guard()
started = process.start("sleeper", ["sh", "-c", "sleep 600 & sleep 600"], run=Path(sys.argv[1]))
guard.watch(started.pid)
print(started.pid, flush=True)
time.sleep(600)
"""


def test_process_groups_die_with_a_killed_session(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SESSION, tmp_path], stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        leader = psutil.Process(int(session.stdout.readline()))
        session.kill()
        gone, alive = psutil.wait_procs([leader, *leader.children(recursive=True)], timeout=10)
    assert gone
    assert not alive
