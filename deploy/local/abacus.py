"""A service that is not ours: `python -m deploy.local.abacus --port 8540` serves sum.v1 by plain gRPC.

It stands for a program of whatever kind and language that knows nothing of Rollcall or Consul. That it can be found is
none of its doing: consul/abacus.json tells Consul of it, with the address that it listens on and how to check it.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from contracts.sum.v1 import sum_pb2, sum_pb2_grpc

THREADS = 4


class Abacus(sum_pb2_grpc.SumServiceServicer):
    """Adds two numbers."""

    def Add(self, request: sum_pb2.AddRequest, _: Any) -> sum_pb2.AddResponse:
        """Return num1 + num2."""
        return sum_pb2.AddResponse(res=request.num1 + request.num2)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local.abacus", description="Adds numbers, by plain gRPC.")
    parser.add_argument("--port", type=int, required=True, help="port of 127.0.0.1 to listen on")
    address = f"127.0.0.1:{parser.parse_args().port}"
    server = grpc.server(ThreadPoolExecutor(THREADS), options=[("grpc.so_reuseport", 0)])
    sum_pb2_grpc.add_SumServiceServicer_to_server(Abacus(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        sys.exit(f"abacus cannot listen on {address}: it is taken")
    server.start()
    print(f"abacus serves at {address}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
