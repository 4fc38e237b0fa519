# The control plane: docker build -t llmplane . && docker run --rm llmplane --help
# Envoy is not in it; a proxy runs the stock image (docker-compose.yaml shows both).

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY crds crds
COPY translator translator
COPY xds xds
COPY llmplane llmplane
# llmplane/examples is a link to it.
COPY examples examples
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN python -m venv /opt/llmplane \
 && /opt/llmplane/bin/pip install --no-cache-dir "$(echo /wheels/llmplane-*.whl)[ratelimit]"

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin llmplane \
 && install --directory --owner llmplane --group llmplane --mode 0700 /var/lib/llmplane
COPY --from=build /opt/llmplane /opt/llmplane
ENV PATH=/opt/llmplane/bin:/usr/local/bin:/usr/bin:/bin
# The last good versions of objects; a restart with a broken file needs them.
ENV XDG_STATE_HOME=/var/lib/llmplane
ENV PYTHONUNBUFFERED=1
VOLUME /var/lib/llmplane
USER 10001
EXPOSE 18000 18080
# With http.client, which knows no http_proxy.
HEALTHCHECK --interval=10s --timeout=5s --retries=3 CMD ["python", "-c", \
  "import http.client as h; c = h.HTTPConnection('127.0.0.1', 18080); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["llmplane"]
