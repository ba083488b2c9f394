"""An instance of greeter that answers with the metadata it was called with."""

import json
from typing import Any

import rollcall
from contracts.greeter.v1 import greeter_pb2, greeter_pb2_grpc
from services.greeter.handler import Greeter


class Telling(Greeter):
    async def Call(self, request: greeter_pb2.CallRequest, context: Any) -> greeter_pb2.CallResponse:
        told = [list(pair) for pair in context.invocation_metadata() if isinstance(pair[1], str)]
        return greeter_pb2.CallResponse(msg=json.dumps([request.name, told]))


service = rollcall.Service("telling")
service.add(greeter_pb2_grpc.add_GreeterServiceServicer_to_server, Telling())
service.run()
