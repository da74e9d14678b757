# docker build --target cuda12 --tag unicl_fast:cuda12 .     (or --target cpu --tag unicl_fast:cpu)
# docker run --gpus all --shm-size 8g --volume /data:/data --volume /runs:/runs \
#     unicl_fast:cuda12 unicl-pretrain --config /runs/run.yaml --out /runs/first --resume auto
#
# torch's wheels bring CUDA's libraries along, so a plain Python is enough; the driver is the host's.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY unicl_fast unicl_fast
COPY pipelines pipelines
COPY tools tools
COPY benchmarks benchmarks
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS base
# A C++ compiler is for efficiency.compile. Versions are not pinned, here and below: the ranges are
# those of pyproject.toml, and Debian's newest compiler is as good as any.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 unicl
COPY --from=wheel /wheels /wheels
WORKDIR /home/unicl
CMD ["unicl-doctor"]

# Much smaller with torch's build for CPUs: --build-arg TORCH_INDEX=URL, with the URL that
# https://pytorch.org/get-started/locally names for it.
FROM base AS cpu
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        "torch>=2.6" "torchvision>=0.21" \
    && set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cpu]"
USER 1000

FROM base AS cuda12
# hadolint ignore=DL3013
RUN set -- /wheels/*.whl \
    && python -m pip install --no-cache-dir "$1[cuda12]"
USER 1000
