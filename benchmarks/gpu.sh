#!/usr/bin/env bash
# Everything that only an NVIDIA GPU can show, from a bare checkout and without a network: builds, runs the `gpu` tests
# and compute-sanitizer on a small set, times every op and whole training steps of an SAE, beside the peers that are
# installed. Needs python3 with torch (CUDA), triton, pytest and hypothesis; takes 4 to 9 minutes, and 12 at most.
#   benchmarks/gpu.sh [FOLDER [DTYPE...]]    (default: benchmarks/results bfloat16)
# writes gpu-<chip>-<dtype>.json and .md, and sae_step-<chip>.json
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:-$root/benchmarks/results}")
cd "$root" || exit
dtypes=("${@:2}")
((${#dtypes[@]})) || dtypes=(bfloat16)
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# step NAME SECONDS COMMAND...: a failure is remembered, but for what only compiles beforehand; no step ends later than
# 12 minutes after the first began
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((720 - SECONDS))
  shift 2
  ((limit < left)) || limit=$((left > 1 ? left : 1))
  timeout --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1
  local code=$?
  printf '== %s: exit %s after %s s\n' "$name" "$code" $((SECONDS - begin)) >"$work/$name.end"
  tail -n 12 "$work/$name.log" | cut -c1-200
  cat "$work/$name.end"
  ((code == 0)) || [[ $name == compile-* ]] || touch "$work/failed"
}

step build 180 python3 -m pip install --quiet --no-deps --no-build-isolation --force-reinstall .
python3 -m clipsteer env
bench() { python3 -m clipsteer bench --device cuda "$@"; }
export -f bench

# what is right, and, beside it, compiling what will be timed
parallel=$(python3 -c "import xdist" 2>/dev/null && echo "-n 12")
# shellcheck disable=SC2046,SC2086
step tests 240 env OMP_NUM_THREADS=1 python3 -m pytest -q -m gpu --durations=5 -p no:warnings $parallel \
  $(grep -rl --include="*.py" "mark\.gpu" tests) &
if command -v compute-sanitizer >/dev/null; then
  step memcheck 150 env OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    python3 -m clipsteer validate --backends triton cuda --dtypes bfloat16 --cases 5 &
fi
# Triton 3.10 fuses no multiplication with an addition unless it is told to
for fused in 0 1; do
  step "fusion-$fused" 240 env OMP_NUM_THREADS=1 TRITON_DEFAULT_FP_FUSION=$fused \
    python3 -m clipsteer validate --backends triton --dtypes float32 bfloat16 --cases 5 &
done
for op in $(python3 -c 'from clipsteer.ops import REGISTRY; print(*(n for n in REGISTRY if n != "drrho_loss"))'); do
  step "compile-$op" 120 bash -c "bench --ops $op --dtype ${dtypes[0]} --repeats 1" >/dev/null &
done
wait

chip=$(python3 -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()))')
for dtype in "${dtypes[@]}"; do
  step "bench-$dtype" 200 bash -c "bench --dtype $dtype --out '$out/gpu-$chip-$dtype.json'"
  python3 -m clipsteer bench --markdown "$out/gpu-$chip-$dtype.json" >"$out/gpu-$chip-$dtype.md"
done
step sae_step 120 python3 -m benchmarks.step --device cuda --autocast --n 49152 --batch 4096 \
  --out "$out/sae_step-$chip.json"
cat "$work"/*.end
test ! -e "$work/failed"
