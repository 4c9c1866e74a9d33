# lsast-serve as a container.
#
#     docker build -t lsast .
#     docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 lsast
#
# Then http://127.0.0.1:8000. Options are environment variables (LSAST_SERVE_TOKEN and so on, docs/server.md). Your own
# styles: -v ~/.local/share/lsast/styles:/data/lsast/styles:ro; a bundle: -v "$PWD/bundle:/bundle:ro" -e LSAST_BUNDLE=/bundle

FROM python:3.12-slim AS build
WORKDIR /src
# Compilers stay here; the image below gets the finished environment alone.
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir build
COPY pyproject.toml README.md LICENSE constraints.txt CHANGELOG.md ./
COPY engines/lsast_engines engines/lsast_engines
COPY runtime/lsast runtime/lsast
COPY train/lsast_train train/lsast_train
COPY export/lsast_export export/lsast_export
COPY eval/lsast_eval eval/lsast_eval
RUN /venv/bin/python -m build --wheel --outdir /dist \
    && python -m venv /lsast \
    && /lsast/bin/pip install --no-cache-dir -c constraints.txt "$(echo /dist/*.whl)[cpu,server]"

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin lsast \
    && install -d -o lsast -g lsast /data
COPY --from=build /lsast /lsast
# Nothing is written but optimised graphs, under /tmp; with --read-only that is the tmpfs. Styles are read from /data.
ENV PATH=/lsast/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/tmp \
    XDG_DATA_HOME=/data \
    LSAST_SERVE_HOST=0.0.0.0 \
    LSAST_SERVE_PORT=8000
USER lsast
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"LSAST_SERVE_PORT\"]}/readyz', timeout=4)"]
# exec form: SIGTERM reaches the server, which finishes what it has accepted.
CMD ["lsast-serve"]
