# Free Transformer on NVIDIA GPUs: trains, evaluates, serves. PyTorch brings CUDA along; the host needs its driver and
# the NVIDIA container toolkit. By itself it runs the demo; `free-transformer serve /model --host 0.0.0.0` serves.
ARG BASE=python:3.12-slim

FROM ${BASE} AS base
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --no-create-home user && mkdir /work && chown user /work
WORKDIR /work
EXPOSE 8000

# What changes seldom comes first: without src, `pip install .` installs an empty package and all that ours needs.
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_COMPILE=1
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir src
RUN --mount=type=cache,target=/tmp/.cache/pip pip install -c constraints.txt torch
RUN --mount=type=cache,target=/tmp/.cache/pip pip install -c constraints.txt '.[demo,serve,export,quantize]'
COPY src src
RUN pip install --no-deps --force-reinstall . && pip uninstall -y pip

FROM base
USER user
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"]
COPY --from=build /opt/venv /opt/venv
COPY configs configs
COPY examples examples
CMD ["python", "examples/three_styles/demo.py"]
