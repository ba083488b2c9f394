# A PostgreSQL for the tests, which keeps nothing: made from the same base as the rest, so that nothing else is pulled.
ARG DEBIAN_IMAGE=debian:bookworm-slim
FROM ${DEBIAN_IMAGE}
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends postgresql \
 && rm -rf /var/lib/apt/lists/* && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ && useradd --uid 10003 --user-group students
COPY tests/kind/postgres.sh /
USER 10003:10003
ENTRYPOINT ["/postgres.sh"]
