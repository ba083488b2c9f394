"""What person does."""

from grpc.aio import ServicerContext

import rollcall
from contracts.person.v1 import person_pb2, person_pb2_grpc

SLEEP = 666  # years
OLDEST = 2**31 - 1 - SLEEP


class Person(person_pb2_grpc.PersonServiceServicer):
    """Puts a person to sleep."""

    async def Do(
        self, request: person_pb2.Person, context: "ServicerContext[person_pb2.Person, person_pb2.Person]"
    ) -> person_pb2.Person:
        """Return the person asleep, and 666 years older."""
        violations = {}
        if not request.name:
            violations["name"] = "must not be empty"
        if not 0 <= request.age <= OLDEST:
            violations["age"] = f"must be from 0 to {OLDEST}, found {request.age}"
        if violations:
            await rollcall.refuse(context, violations)
        return person_pb2.Person(name=f"{request.name} is sleeping", age=request.age + SLEEP)
