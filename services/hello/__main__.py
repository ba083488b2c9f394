"""Run one instance: `python -m services.hello --help`."""

from contracts.hello.v1.hello import HELLO
from rollcall import jsonrpc
from services.hello.handler import Hello

service = jsonrpc.Service("hello")
service.register(HELLO, Hello())
service.run()
