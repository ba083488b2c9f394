"""hello: greets, in Chinese, over JSON-RPC."""
