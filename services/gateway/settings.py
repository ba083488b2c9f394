"""The settings of one instance of the gateway."""

from typing import Annotated

from pydantic import AfterValidator, Field

from rollcall import web
from rollcall.settings import LIVE, Strings

_OURS = ("connection", "content-type", "host", "te", "traceparent", "transfer-encoding", "user-agent")


def _forwardable(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        plain = name.replace("-", "").replace("_", "").replace(".", "")
        if not (name == name.lower() and plain.isascii() and plain.isalnum()):
            raise ValueError("expected names of headers in lower case")
        if name in _OURS or name.startswith("grpc-") or name.endswith("-bin"):
            raise ValueError(f"expected headers that a client may set, not {name}")
    return names


class GatewaySettings(web.Settings):
    """The settings of every HTTP service, and what of the system is let out, to whom, and how much of it at a time."""

    public_tag: str = Field("public", min_length=1, description="the tag of services that are reachable from outside")
    deadline: Annotated[float, Field(gt=0, le=86_400), LIVE] = Field(
        5.0, description="seconds for a call with one answer whose client gives no deadline"
    )
    longest: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0, description="most seconds that such a call gets, whatever its client says"
    )
    max_body: Annotated[int, Field(ge=1, le=64 * 1024 * 1024)] = Field(
        1_048_576, description="most bytes of a request, and of a message that is sent over a WebSocket"
    )
    max_calls: Annotated[int, Field(ge=1), LIVE] = Field(
        256, description="most calls with one answer in flight; more are refused at once, with 429"
    )
    max_streams: Annotated[int, Field(ge=1), LIVE] = Field(
        256, description="most open streams; more are refused, with 429"
    )
    forward: Annotated[Strings, AfterValidator(_forwardable)] = Field(
        ("idempotency-key", "tracestate", "x-request-id"),
        description="headers of clients that reach the services, by commas; all others do not",
    )
    cors_origins: Strings = Field(
        (), description="origins whose pages may call the gateway, such as https://example.com, by commas; or *"
    )
    hosts: Strings = Field(
        (),
        description="names that clients call the gateway by, beside IP addresses and localhost, by commas; or *. "
        "Others are refused: a page could have its own name lead here, and would count as one of the gateway's",
    )
    page: bool = Field(
        default=True,
        description="whether the web page is served, with the live map of all the system, public or not",
    )
    consul_ui: str = Field("", description="address of Consul's web page, for people; default: the first server's")

    @property
    def consul_page(self) -> str:
        """The address of Consul's web page; empty where there is no Consul."""
        if self.registry != "consul":
            return self.consul_ui
        first = self.consul[0]
        base = first if "://" in first else f"{'https' if self.consul_ca else 'http'}://{first}"
        return self.consul_ui or f"{base}/ui"
