# One image for the three containers: keeper, server, driver. Not root by default; the manifests make keeper and driver
# root, because they mount.
FROM python:3.12.11-slim-bookworm AS build
# The versions of build tools are the distribution's: they leave nothing but the extension module behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fuse3 gcc libc6-dev libfuse3-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
ENV PIP_CONSTRAINT=/src/constraints.txt \
    PIP_BUILD_CONSTRAINT=/src/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/cachefs
COPY pyproject.toml README.md LICENSE ./
COPY cachefs ./cachefs
COPY csi ./csi
RUN /opt/cachefs/bin/pip install ".[csi]" \
    && /opt/cachefs/bin/pip uninstall --yes pip \
    && /opt/cachefs/bin/python -m compileall -q /opt/cachefs

FROM python:3.12.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libfuse3-3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cachefs /opt/cachefs
ENV PATH=/opt/cachefs/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GRPC_ENABLE_FORK_SUPPORT=0
USER 65534:65534
WORKDIR /
ENTRYPOINT ["cachefs"]
CMD ["--help"]
