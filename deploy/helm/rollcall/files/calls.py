"""Call each service once through the gateway, which finds it in Consul. Run by `helm test`."""

import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

SECONDS = 60.0  # in which every call has to succeed: an installation may be a moment old
PAUSE = 0.5  # seconds


def main() -> int:
    """Make the calls; 0 if all are answered as expected."""
    what = json.loads(Path(sys.argv[1]).read_text())
    deadline = time.monotonic() + SECONDS
    return max([made(what["gateway"], call, deadline) for call in what["calls"]], default=0)


def made(gateway: str, call: dict[str, Any], deadline: float) -> int:
    """Make a call until it is answered; 0 if that is as expected."""
    name = f"{call['service']}.{call['method']}"
    url = f"{gateway}/v1/{call['service']}/{call['method']}"
    body = json.dumps(call.get("request", {})).encode()
    while True:
        try:
            with urlopen(Request(url, body, {"content-type": "application/json"}), timeout=10) as answer:  # noqa: S310
                found, instance = json.load(answer), answer.headers["rollcall-instance"]
            break
        except HTTPError as error:
            problem = f"{error.code} {error.read().decode()}"
        except (URLError, OSError) as error:
            problem = str(error)
        if time.monotonic() > deadline:
            print(f"{name}: expected an answer from {url}, found: {problem}")
            return 1
        time.sleep(PAUSE)
    if "answer" in call and found != call["answer"]:
        print(f"{name}: expected {call['answer']}, found {found}")
        return 1
    print(f"{name} = {json.dumps(found, ensure_ascii=False)}    answered by {instance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
