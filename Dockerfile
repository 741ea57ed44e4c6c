# CPU:  docker build --target worker .
# CUDA: docker build --target worker --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
# TORCH_INDEX may name PyTorch's index of CPU or of other CUDA builds; the default index has one CUDA build, which runs on CPUs too.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS base
# The CUDA images bring no Python.
RUN command -v python3 >/dev/null || { apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }
ENV PATH=/opt/halfquad/bin:$PATH \
    PYTHONUNBUFFERED=1

FROM base AS build
ARG TORCH_INDEX=
RUN python3 -m venv /opt/halfquad
COPY constraints.txt /src/
# torch alone, in a layer that a change of ours leaves in the cache
RUN pip install --no-cache-dir --constraint /src/constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch
COPY pyproject.toml README.md LICENSE /src/
COPY hqq_core /src/hqq_core
COPY service /src/service
COPY worker /src/worker
# evaluate: transformers, without which there are no synthetic energies; s3: targets in buckets
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[evaluate,s3]'

FROM base AS runtime
COPY --from=build /opt/halfquad /opt/halfquad
RUN install --directory --owner 10001 --group 10001 --mode 0700 /data
USER 10001:10001
ENV HALFQUAD_DATA_DIR=/data \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1
WORKDIR /tmp
VOLUME /data
ENTRYPOINT ["halfquad"]

FROM runtime AS api
ENV HALFQUAD_HOST=0.0.0.0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
CMD ["api"]

FROM runtime AS worker
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s \
  CMD ["sh", "-c", "python -m celery -A worker.app inspect ping --timeout 10 --destination worker@$(hostname)"]
CMD ["worker", "--name", "worker"]
