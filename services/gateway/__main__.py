"""Run one instance: `python -m services.gateway --help`."""

from rollcall import web
from services.gateway.app import app
from services.gateway.settings import GatewaySettings

service = web.Service("gateway", app, settings=GatewaySettings)
service.run()
