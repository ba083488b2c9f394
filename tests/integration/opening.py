"""A sum with a setting of its own and something to open first, which takes as long as it is told."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import Field

import rollcall
from contracts.sum.v1 import sum_pb2_grpc
from services.sum.handler import Sum

log = logging.getLogger(__name__)


class Settings(rollcall.ServiceSettings):
    opens_in: float = Field(0.0, description="seconds that opening takes")


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Sum]:
    log.info("opening")
    await asyncio.sleep(settings.opens_in)
    yield Sum()
    log.info("closed")


service = rollcall.Service("sum", settings=Settings)
service.add(sum_pb2_grpc.add_SumServiceServicer_to_server, opened)
service.run()
