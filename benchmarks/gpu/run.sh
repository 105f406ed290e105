#!/usr/bin/env bash
# Measures everything on one GPU: correctness, then speed and learning. Results go to $OUT (default runs/gpu), and each
# part keeps what it has measured when its time is up. Under 8 minutes in all.
#   benchmarks/gpu/run.sh [PART[:SECONDS] ...]   parts: tests training plan_gradient generation peers learning
#   SMALL=1 benchmarks/gpu/run.sh ...            the same with tiny shapes, to try it on a CPU
cd "$(dirname "$0")/../.." || exit 1
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}
declare -A limit=([tests]=90 [training]=130 [plan_gradient]=25 [generation]=55 [peers]=40 [learning]=135)
parts=${*:-tests training plan_gradient generation peers learning}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}

install() { # folder of wheels, target: for a machine without a network, see bundle.sh
  [ -d "$1" ] || return
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$2" "$1"/*.whl \
    >>"$OUT/log.txt" 2>&1
}
peers=()
if [ -z "${SMALL:-}" ]; then
  install .gpu/wheels "$SITE"
  [ -d "$SITE" ] && export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
  install .gpu/peers/x-transformers "$SITE-x-transformers" && peers+=(--x-transformers "$SITE-x-transformers")
  install .gpu/peers/free-transformer "$SITE-free-transformer" && peers+=(--free-transformer-012 "$SITE-free-transformer")
fi
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}

run_tests() {
  [ -z "${SMALL:-}" ] || export FREE_TRANSFORMER_TEST_DEVICE=cpu
  timeout --signal=INT --kill-after=10 "$1" "$PYTHON" -m pytest -q -p no:cacheprovider -n 8 --dist worksteal \
    --junitxml "$OUT/tests.xml" tests/model/test_cuda.py
}

run_part() { # part, seconds: no measurement starts in the last tenth
  local more=()
  [ "$1" = peers ] && more=("${peers[@]}")
  timeout --kill-after=5 "$2" "$PYTHON" -W ignore "benchmarks/gpu/$1.py" --out "$OUT/$1.json" --seconds "$(($2 * 9 / 10))" \
    ${SMALL:+--small} "${more[@]}"
}

for each in $parts; do
  part=${each%%:*} seconds=${limit[${each%%:*}]}
  [ -n "$seconds" ] || { echo "unknown part $part: one of ${!limit[*]}"; exit 2; }
  [ "$each" = "$part" ] || seconds=${each#*:}
  echo "== $part, at most $seconds s, $(date +%T)" | tee -a "$OUT/log.txt"
  if [ "$part" = tests ]; then run_tests "$seconds"; else run_part "$part" "$seconds"; fi >"$OUT/part.txt" 2>&1
  echo "exit code $?" >>"$OUT/part.txt"
  cat "$OUT/part.txt" >>"$OUT/log.txt"
  grep -E '^(FAILED|ERROR|exit code)|[0-9]+ (passed|failed)|"error"' "$OUT/part.txt" | cut -c1-300 | tail -12
done
rm -rf "$OUT/part.txt" "$OUT/learning"
"$PYTHON" benchmarks/gpu/report.py "$OUT" --print 2>&1 | tee -a "$OUT/log.txt" | cut -c1-400 | tail -c 8500
