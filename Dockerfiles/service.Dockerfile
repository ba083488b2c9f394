# The image of one service:
#
#   docker build -f Dockerfiles/service.Dockerfile --build-arg SERVICE=sum -t rollcall/sum .
#
# What changes seldom comes first, so that after a change of code alone only files are copied. No BuildKit is needed.

ARG PYTHON_IMAGE=python:3.13-slim-bookworm

# The contracts, generated from protos/.
FROM ${PYTHON_IMAGE} AS contracts
WORKDIR /src
COPY requirements/proto.txt requirements/
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore --require-hashes -r requirements/proto.txt
COPY protos protos
RUN python protos/generate.py

# The packages: what every service stands on first, which all images share, then what only this one needs.
FROM ${PYTHON_IMAGE} AS packages
WORKDIR /src
RUN python -m venv --without-pip /opt/rollcall
COPY requirements/runtime.txt requirements/
RUN pip --python /opt/rollcall/bin/python install --no-cache-dir --disable-pip-version-check --require-hashes -r requirements/runtime.txt
ARG SERVICE
COPY requirements/web.txt requirements/
COPY services/${SERVICE}/requirements.txt services/${SERVICE}/
RUN pip --python /opt/rollcall/bin/python install --no-cache-dir --disable-pip-version-check --require-hashes -r services/${SERVICE}/requirements.txt

# The code: the library, the service without its tests, and of the contracts those that it names.
FROM ${PYTHON_IMAGE} AS code
WORKDIR /src
COPY rollcall rollcall
ARG SERVICE
COPY services/${SERVICE} services/${SERVICE}
COPY --from=contracts /src/contracts contracts
RUN mkdir -p /app/contracts /app/services \
 && cp -r rollcall /app/ \
 && cp -r services/${SERVICE} /app/services/ && rm -r /app/services/${SERVICE}/tests \
 && cp contracts/__init__.py /app/contracts/ \
 && for each in $(grep -rhoE '^from contracts\.\w+' /app/services | cut -d. -f2 | sort -u); do cp -r contracts/$each /app/contracts/; done \
 && find /app -name '*.pyi' -delete \
 && python -m compileall -q --invalidation-mode unchecked-hash /app \
 && printf '#!/opt/rollcall/bin/python\nimport runpy\n\nrunpy.run_module("services.%s", run_name="__main__", alter_sys=True)\n' ${SERVICE} > /app/serve \
 && chmod 755 /app/serve

FROM ${PYTHON_IMAGE}
RUN python -m pip uninstall --yes --quiet --root-user-action=ignore pip \
 && rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')" \
 && groupadd --gid 10001 rollcall && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent rollcall
COPY --from=packages /opt/rollcall /opt/rollcall
COPY --from=code /app /app
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
# Health is Kubernetes' to ask: grpc.health.v1, or /livez and /readyz. SIGTERM drains.
ENTRYPOINT ["/app/serve"]
ARG SERVICE
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="rollcall-${SERVICE}" \
      org.opencontainers.image.description="The service ${SERVICE} of Rollcall, which registers itself with Consul" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
