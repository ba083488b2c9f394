"""Run one instance: `python -m services.sum --help`."""

import rollcall
from contracts.sum.v1 import sum_pb2_grpc
from services.sum.handler import Sum

service = rollcall.Service("sum")
service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, Sum())
service.run()
