# The trainer and its tools. One image for CPUs and GPUs: PyTorch's build on PyPI runs on both.
#
#   docker build -f docker/trainer.Dockerfile -t lift-trainer:0.1.0 .
#
# PYTHON_IMAGE   base image with Python 3.11
# EXTRAS         of lift-trainer: data (the demo's drawings), joint (CLIP's text transformer)
# VERSION, REVISION   for the labels; VERSION has to be that of the source
# A folder of wheels can be handed in as the build context `wheels`.
ARG PYTHON_IMAGE=python:3.11-slim

FROM scratch AS wheels

FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS=data,joint
# Bytecode is made here, once: under a read-only root it would be made again at every start.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/lift
ENV PATH=/opt/lift/bin:$PATH
WORKDIR /src
COPY requirements/trainer.lock requirements/
RUN sed -n 's/^\([A-Za-z0-9][^ ]*==[^ ]*\).*/\1/p' requirements/trainer.lock > versions.txt
COPY shared/pyproject.toml shared/
COPY services/trainer/pyproject.toml services/trainer/
COPY docker/install.py docker/
RUN --mount=type=bind,from=wheels,target=/wheels \
    python docker/install.py services/trainer "$EXTRAS" -c versions.txt --find-links /wheels
COPY shared shared
COPY services/trainer services/trainer
ARG VERSION=0.1.0
RUN pip install --no-deps --no-build-isolation ./shared ./services/trainer \
    && { [ "$(lift-train --version)" = "$VERSION" ] || { echo "error: VERSION=$VERSION is not that of the source" >&2; exit 1; }; } \
    && pip uninstall -q -y pip

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lift-trainer" \
      org.opencontainers.image.description="Trains an image encoder against a cache of frozen caption embeddings" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A volume takes its owner from the image that mounts it first: see docker/embedder.Dockerfile.
RUN groupadd --gid 10002 trainer && useradd --uid 10002 --gid trainer --no-create-home --home-dir /tmp trainer \
    && install -d -o 10002 -g 10002 /runs /data && install -d -o 10001 -g 10001 /cache
COPY --from=build /opt/lift /opt/lift
COPY scripts/demo.yaml /opt/lift/demo.yaml
ENV PATH=/opt/lift/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LIFT_INDEX_DIR=/runs/.index LIFT_SHARD_CACHE=/runs/.shards HF_HOME=/runs/.hub TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
USER 10002:10002
WORKDIR /runs
CMD ["lift-train", "--help"]
