"""What sum does."""

from grpc.aio import ServicerContext

from contracts.sum.v1 import sum_pb2, sum_pb2_grpc


class Sum(sum_pb2_grpc.SumServiceServicer):
    """Adds two numbers."""

    async def Add(
        self, request: sum_pb2.AddRequest, _: "ServicerContext[sum_pb2.AddRequest, sum_pb2.AddResponse]"
    ) -> sum_pb2.AddResponse:
        """Return num1 + num2: two int32 in, so their sum fits the int64 out."""
        return sum_pb2.AddResponse(res=request.num1 + request.num2)
