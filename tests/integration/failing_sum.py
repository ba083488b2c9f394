"""A sum whose handler only fails for as long as a file exists."""

import os
from pathlib import Path
from typing import Any

import rollcall
from contracts.sum.v1 import sum_pb2, sum_pb2_grpc

BROKEN = Path(os.environ["BROKEN"])


class Sum(sum_pb2_grpc.SumServiceServicer):
    async def Add(self, request: sum_pb2.AddRequest, context: Any) -> sum_pb2.AddResponse:  # noqa: ARG002
        if BROKEN.exists():  # noqa: ASYNC240 (it does not take long)
            raise RuntimeError("broken")
        return sum_pb2.AddResponse(res=request.num1 + request.num2)


service = rollcall.Service("sum")
service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, Sum())
service.run()
