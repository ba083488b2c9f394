"""Run one instance: `python -m services.student --help`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import rollcall
from contracts.student.v1 import student_pb2_grpc
from contracts.sum.v1 import sum_pb2_grpc
from services.student.handler import Student
from services.student.settings import StudentSettings
from services.student.store import Store


@asynccontextmanager
async def student(settings: StudentSettings) -> AsyncIterator[Student]:
    """Open what the service stands on, the store and the channel to sum, for as long as it runs."""
    async with (
        Store(settings.database, settings.database_password_file) as store,
        rollcall.dial("sum", registry=settings.open_registry()) as channel,
    ):
        yield Student(store, sum_pb2_grpc.SumServiceStub(channel))


service = rollcall.Service("student", settings=StudentSettings)
service.add(student_pb2_grpc.add_StudentServiceServicer_to_server, student)
service.run()
