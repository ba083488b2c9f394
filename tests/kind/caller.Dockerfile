# The caller of the tests: a service's image, with all contracts, and the caller instead of the service.
ARG BASE
FROM ${BASE}
COPY contracts /app/contracts
COPY tests/kind/caller.py tests/kind/bench.py /app/
ENTRYPOINT ["/opt/rollcall/bin/python", "-m", "caller"]
