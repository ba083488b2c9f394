"""The gateway: HTTP, WebSocket and a web page for every service that is registered and public."""
