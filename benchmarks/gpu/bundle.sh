#!/usr/bin/env bash
# Fills .gpu/ (12 MB) with what a GPU machine without a network lacks: wheels for Python 3.12 on Linux, the peers, and
# the demo's text. Run it after `make .venv/.dev`, where there is a network. `run.sh` installs from .gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
rm -rf .gpu/wheels .gpu/peers .gpu/text
mkdir -p .gpu/text

download() { # folder, requirements: these wheels alone, without their dependencies
  local folder=$1
  shift
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 --dest "$folder" "$@"
}
installed() { # NAME==VERSION of packages, in the versions that the tests run with here
  "$python" -c 'import sys, importlib.metadata as m; print(*(f"{name}=={m.version(name)}" for name in sys.argv[1:]))' "$@"
}
peer() { grep --only-matching "PEER = $1==.*" Makefile | cut --delimiter=' ' --fields=3; }

# What `train`, `serve` and int8 weights need besides PyTorch, transformers and the usual scientific packages. This
# release of fastapi does not need opentelemetry-api, as 0.165 does.
versions=$(installed pydantic pydantic-core annotated-types typing-inspection typing-extensions ruamel.yaml plotext \
  starlette uvicorn torchao)
read -ra wheels <<<"$versions"
download .gpu/wheels "${wheels[@]}" fastapi==0.140.0
download .gpu/peers/x-transformers "$(peer x-transformers)" einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 \
  torch-einops-utils==0.2.0
download .gpu/peers/free-transformer "$(peer free-transformer)"

PYTHONPATH=src:examples/three_styles "$python" -c \
  'from pathlib import Path; from styles import write_corpus; write_corpus(Path(".gpu/text"))'
gzip --force --best --no-name .gpu/text/*.jsonl
(cd .gpu && find . -type f -printf '%9s %P\n' | sort --key=2 && du --summarize --human-readable .)
