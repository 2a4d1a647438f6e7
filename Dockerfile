# The server without its embedded services: it wants a PostgreSQL and a Redis.
FROM python:3.12-slim-trixie AS build
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY client client
COPY server server
COPY migrations migrations
RUN python -m venv /opt/quantplane \
 && /opt/quantplane/bin/pip install --no-cache-dir -c constraints.txt ./client .

FROM python:3.12-slim-trixie
# pg_dump and pg_restore, for backups of a PostgreSQL 17 or older.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends postgresql-client \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home quantplane
COPY --from=build /opt/quantplane /opt/quantplane
# A container is only reached from outside where it listens on all interfaces. So it
# serves with QUANTPLANE_TLS_CERT and QUANTPLANE_TLS_KEY, or with QUANTPLANE_INSECURE=true
# where its network is closed: docs/deployment.md.
ENV PATH=/opt/quantplane/bin:$PATH PYTHONUNBUFFERED=1 QUANTPLANE_LISTEN=0.0.0.0:50051
USER quantplane
EXPOSE 50051
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["quantplane-server", "health", "--target", "127.0.0.1:50051"]
ENTRYPOINT ["quantplane-server"]
CMD ["serve"]
