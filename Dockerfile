# docker build --target cuda13 --tag unicl_fast:cuda13 .             (targets: cuda13, cuda12, cpu)
# docker run --gpus all --shm-size 8g --volume /data:/data --volume /runs:/runs \
#     unicl_fast:cuda13 unicl-pretrain --config /runs/run.yaml --out /runs/first --resume auto
#
# torch's wheels bring CUDA's libraries along, so a plain Python is enough; the driver is the host's.
# PyPI's torch is for one version of CUDA, in 2026 for 13. For a driver of CUDA 12, or without any,
# take torch from where https://pytorch.org/get-started/locally says: --build-arg TORCH_INDEX=URL
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY unicl_fast unicl_fast
COPY pipelines pipelines
COPY tools tools
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS base
ARG TORCH_INDEX=
# A C++ compiler is for efficiency.compile. Versions are not pinned, here and below: the ranges are
# those of pyproject.toml, and Debian's newest compiler is as good as any.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 unicl
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "torch>=2.6" "torchvision>=0.21"
COPY --from=wheel /wheels /wheels
WORKDIR /home/unicl
CMD ["unicl-doctor"]

FROM base AS cpu
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cpu]"
USER 1000

FROM base AS cuda12
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cuda12]"
USER 1000

FROM base AS cuda13
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cuda13]"
USER 1000
