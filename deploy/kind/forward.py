"""`python -m deploy.kind.forward CONTEXT NAMESPACE WHAT PORT:PORT`: forward a port for as long as this runs.

kubectl's own forwarding ends with the pod that it has chosen; this begins again, with another one.
"""

from __future__ import annotations

import subprocess
import sys
import threading

PAUSE = 0.5  # seconds


def main(context: str, namespace: str, what: str, ports: str) -> None:
    """Forward until killed."""
    command = ["kubectl", "--context", context, "--namespace", namespace, "port-forward", what, ports]
    while True:
        subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        threading.Event().wait(PAUSE)


if __name__ == "__main__":
    main(*sys.argv[1:])
