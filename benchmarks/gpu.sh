#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can show, from a bare checkout and without a network: builds, runs the `gpu` tests,
# runs compute-sanitizer on a small set, times every op. Needs python3 with torch (CUDA), triton, pytest and hypothesis.
#   benchmarks/gpu.sh [FOLDER]    writes gpu-<chip>.json and gpu-<chip>.md there (default: benchmarks/results)
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-benchmarks/results}")
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME SECONDS COMMAND...: a failure is remembered and the rest still runs
step() {
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  printf '\n== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@"
  local code=$?
  ((code == 0)) || failed=1
  printf -- '-- %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - begin)) | tee -a "$log"
}

step "build" 180 python3 -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
step "environment" 60 python3 -m clipsteer env
parallel=$(python3 -c "import xdist" 2>/dev/null && echo "-n 14")
# shellcheck disable=SC2046,SC2086
step "tests" 240 env OMP_NUM_THREADS=1 python3 -m pytest -q -m gpu --durations=5 $parallel $(grep -l 'mark\.gpu' tests/*.py)
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m clipsteer validate --backends triton cuda --dtypes bfloat16 --cases 5
  done
else
  echo "no compute-sanitizer here"
fi
chip=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
for dtype in bfloat16 float32; do
  step "benchmark $dtype" 150 python3 -m clipsteer bench --device cuda --dtype "$dtype" --out "$out/gpu-$chip-$dtype.json" \
    | tee "$out/gpu-$chip-$dtype.txt"
done
printf '\n'
cat "$log"
exit "$failed"
