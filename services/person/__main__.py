"""Run one instance: `python -m services.person --help`."""

import rollcall
from contracts.person.v1 import person_pb2_grpc
from services.person.handler import Person

service = rollcall.Service("person", check=rollcall.TtlCheck(3))
service.add(person_pb2_grpc.add_PersonServiceServicer_to_server, Person())
service.run()
