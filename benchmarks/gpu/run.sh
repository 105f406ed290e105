#!/usr/bin/env bash
# Everything on one GPU in under eight minutes: correctness first, then speed and learning. Usage: benchmarks/gpu/run.sh
# [PART ...] with the parts tests, training, plan_gradient, generation, peers and learning. Results go to $OUT, by
# default runs/gpu, and are kept where a part is cut. SMALL=1 tries everything out on a CPU.
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
parts=${*:-tests training plan_gradient generation peers learning}
declare -A seconds=([tests]=110 [training]=170 [plan_gradient]=40 [generation]=80 [peers]=70 [learning]=240)
mkdir -p "$OUT"

install_from() { # wheels, folder: what a machine without a network lacks, see bundle.sh
  [ -d "$1" ] && "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$2" "$1"/*.whl
}
if [ -d .gpu/wheels ] && [ -z "${SMALL:-}" ]; then
  site=$(mktemp -d)
  install_from .gpu/wheels "$site" 2>>"$OUT/log.txt"
  install_from .gpu/peers/x-transformers .gpu/peers/x-transformers/site 2>>"$OUT/log.txt"
  install_from .gpu/peers/free-transformer .gpu/peers/free-transformer/site 2>>"$OUT/log.txt"
  export PYTHONPATH=$site
fi
export PYTHONPATH=src:benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}

run_part() {
  if [ "$1" = tests ]; then
    FREE_TRANSFORMER_TEST_DEVICE=${SMALL:+cpu} timeout "${seconds[tests]}" "$PYTHON" -m pytest -q -p no:cacheprovider \
      -n 4 --dist worksteal --junitxml "$OUT/tests.xml" tests/test_cuda.py tests/test_gpu_step.py
  else
    timeout "${seconds[$1]}" "$PYTHON" -W ignore "benchmarks/gpu/$1.py" --out "$OUT/$1.json" \
      --seconds "${SECONDS_EACH:-${seconds[$1]}}" ${SMALL:+--small}
  fi
}
for part in $parts; do
  echo "== $part, $(date +%T)" | tee -a "$OUT/log.txt"
  run_part "$part" >"$OUT/part.txt" 2>&1
  echo "exit $?" >>"$OUT/part.txt"
  cat "$OUT/part.txt" >>"$OUT/log.txt"
  grep -E "^(FAILED|ERROR|exit|[0-9]+ (passed|failed))|passed|^[a-zA-Z_0-9]+ \(" "$OUT/part.txt" | cut -c1-420 | tail -40
done
rm -f "$OUT/part.txt"
rm -rf "$OUT/learning"
