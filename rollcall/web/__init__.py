"""Services that answer HTTP and WebSockets by an ASGI application. Needs `pip install rollcall-chassis[web]`.

@asynccontextmanager
async def app(settings):
    async with rollcall.dial("sum") as channel:
        yield build_an_asgi_application(channel)

service = web.Service("front", app)
service.run()
"""

from rollcall.web.exchange import Exchange
from rollcall.web.server import Server
from rollcall.web.service import Service
from rollcall.web.settings import Settings

__all__ = ["Exchange", "Server", "Service", "Settings"]
