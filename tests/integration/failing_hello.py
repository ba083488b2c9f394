"""A hello whose handler only fails for as long as a file exists."""

import os
from pathlib import Path

from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc

BROKEN = Path(os.environ["BROKEN"])


class Hello:
    async def HelloWorld(self, name: str) -> str:
        if BROKEN.exists():  # noqa: ASYNC240 (it does not take long)
            raise RuntimeError("broken")
        return f"{name} 你好"


service = jsonrpc.Service("hello")
service.register(HELLO, Hello())
service.run()
