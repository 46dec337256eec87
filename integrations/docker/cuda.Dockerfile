# flax_pref on NVIDIA GPUs. From the root of a clone:
#     docker build --file integrations/docker/cuda.Dockerfile --tag flax-pref:cuda .

FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY integrations integrations
COPY flax_pref flax_pref
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# CUDA itself comes with JAX's packages; the driver, 580 or newer, is the host's.
FROM python:3.12-slim
ARG EXTRA=cuda
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir "$(echo /wheels/flax_pref-*.whl)[$EXTRA]"
RUN useradd --create-home --uid 1000 flax && install --directory --owner flax /cache /work
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What is downloaded or compiled outlives the container where /cache is a volume.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
VOLUME ["/cache", "/work"]
USER flax
WORKDIR /work
ENTRYPOINT ["flax-pref"]
CMD ["--help"]
