"""Run one instance: `python -m services.greeter --help`."""

import rollcall
from contracts.greeter.v1 import greeter_pb2_grpc
from services.greeter.handler import Greeter

service = rollcall.Service("greeter")
service.add(greeter_pb2_grpc.add_GreeterServiceServicer_to_server, Greeter())
service.run()
