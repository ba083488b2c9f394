"""A watcher: `python -m bench.watcher SERVICE SUBSET`; follows a service as a dialled channel does, without calling it.

For each snapshot it has applied it writes a line: when, how many bytes gRPC is told, and its CPU time so far.
"""

import json
import sys
import threading
import time

from rollcall.channel import default_registry
from rollcall.discovery import xds
from rollcall.discovery.bridge import Service
from rollcall.policy import Policy


def main(name: str, subset: str) -> None:
    service: list[Service] = []
    constructed = threading.Event()

    def changed(type_url: str) -> None:
        constructed.wait()
        resource = service[0].resource(type_url)
        told = xds.pack(resource).ByteSize() if resource else 0
        print(json.dumps({"when": time.time(), "cpu": time.process_time(), "bytes": told}), flush=True)

    policy = Policy({"subset": int(subset), "deadline": 60})
    service.append(Service(xds.key_of(name), name, "", default_registry(), policy, "watcher", changed))
    constructed.set()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
