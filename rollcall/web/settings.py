"""`Settings`: the settings of one instance that answers HTTP."""

from typing import Annotated

from pydantic import Field

from rollcall.settings import ServiceSettings


class Settings(ServiceSettings):
    """What every HTTP service can be told, beside what every service can."""

    slow: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0,
        description="seconds that a client has to send a request's headers, and that it may hold an answer back by "
        "not reading it; its connection is closed then",
    )
    connections: Annotated[int, Field(ge=1)] = Field(
        1024, description="most connections of clients; more are refused, with 503"
    )
    max_body: Annotated[int, Field(ge=1, le=64 * 1024 * 1024)] = Field(
        1_048_576, description="most bytes of a message that is sent over a WebSocket"
    )
