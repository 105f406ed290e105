#!/usr/bin/env bash
# Collects what a GPU machine without a network needs beside a checkout: wheels, peers and text, about 20 MB in .gpu/.
# The wheels fit Python 3.12 on Linux. Run it once, where there is a network: benchmarks/gpu/bundle.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
rm -rf .gpu/wheels .gpu/peers .gpu/text
mkdir -p .gpu/wheels .gpu/peers/x-transformers .gpu/peers/free-transformer .gpu/text

download() { # folder, then requirements; nothing that they need comes along
  local folder=$1
  shift
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$folder" "$@"
}

# What `free-transformer train`, `serve` and int8 need beside PyTorch, transformers and the usual scientific packages.
download .gpu/wheels pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions \
  ruamel.yaml==0.19.1 plotext==6.1.0 fastapi==0.140.0 starlette uvicorn==0.54.0 torchao==0.18.0
download .gpu/peers/x-transformers x-transformers==2.31.10 einx frozendict loguru torch-einops-utils
download .gpu/peers/free-transformer free-transformer==0.1.2

# The demo's text.
"$python" - <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, "examples/three_voices")
from voices import write_corpus

write_corpus(Path(".gpu/text"))
PYTHON
gzip --force --best .gpu/text/*.jsonl
du --summarize --human-readable .gpu/*
