# flax_pref on a TPU VM. From the root of a clone:
#     docker build --file integrations/docker/tpu.Dockerfile --tag flax-pref:tpu .

FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY integrations integrations
COPY flax_pref flax_pref
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG EXTRA=tpu
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir "$(echo /wheels/flax_pref-*.whl)[$EXTRA]" gcsfs
RUN useradd --create-home --uid 1000 flax && install --directory --owner flax /cache /work
# What is downloaded or compiled outlives the container where /cache is a volume.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
VOLUME ["/cache", "/work"]
USER flax
WORKDIR /work
ENTRYPOINT ["flax-pref"]
CMD ["--help"]
