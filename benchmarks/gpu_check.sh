#!/usr/bin/env bash
# Everything that needs a GPU: benchmarks/gpu_check.sh [PART...], by default all parts, in order. Where a call may
# take ten minutes only: "build tests generation codec", then "sanitize", then "bench", then "compile".
#   build       the native code, by nvcc too
#   tests       those that use a GPU, every backend against float64; PYTEST_ARGS="-n 16 tests" takes the whole suite,
#               whose tests of Triton's interpreter and of sound files need no GPU but the package's dependencies
#   sanitize    compute-sanitizer over the native kernels: memcheck, racecheck, synccheck
#   generation  sampling with an AAR of depth 16: as one CUDA graph, launched kernel by kernel, in plain PyTorch; and as a
#               next-token model, with and without a graph per token
#   codec       SAT, EnCodec and Mimi: autoencoders in Triton, SAT's as CUDA graphs, against eager PyTorch
#   bench       every operator against eager PyTorch, both also as CUDA graphs
#   compile     the same against torch.compile, which takes minutes
# PYTHON names the interpreter; results go to OUT (default: build/gpu_check): JSON, logs, and a table on the terminal.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
export PYTHONPATH=.:${PYTHONPATH:-} OUT
mkdir -p "$OUT"
failed=()

build() {
  "$PYTHON" -m aar_kernels.build && "$PYTHON" -m aar_kernels.info --json > "$OUT/info.json" || return 1
  # Without the library its tests would be skipped, and everything would pass.
  "$PYTHON" -c 'import sys; from aar_kernels._library import library; sys.exit(library.reason or library.cuda_reason)'
}

tests() { "$PYTHON" -m pytest -q -p no:cacheprovider --junitxml "$OUT/tests.xml" ${PYTEST_ARGS:-$GPU_TESTS}; }
GPU_TESTS="tests/cuda tests/linear/test_linear_cuda.py tests/aar/test_generation_graph.py tests/aar/test_sat_graph.py"

sanitize() {
  local tool
  for tool in memcheck racecheck synccheck; do
    # Few cases: a kernel runs about a hundred times slower. Every plan is among them.
    timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=aar \
      "$PYTHON" -m pytest -q -p no:cacheprovider tests/cuda/test_cuda_backends.py -k "native and ($SANITIZED)" || return 1
  done
}
SANITIZED="test_encode[native-3] or test_encode[native-12] or test_encode[native-17] or published_sizes or long or \
test_decode[native-12 or test_decode[native-17 or test_step[native-12"

# GENERATION="--depth 2 --batch 1" tries it out on a CPU.
generation() {
  "$PYTHON" -m benchmarks.generation --threads 1 ${GENERATION:---device cuda --batch 1 64} --no-compile \
    --json "$OUT/generation.json"
}

# CODEC="--codec small --batch 2 --runs 1" tries it out on a CPU.
codec() {
  "$PYTHON" -m benchmarks.codec --threads 1 ${CODEC:---device cuda --batch 1 64} --no-compile --json "$OUT/codec.json"
}

bench() {
  "$PYTHON" -m aar_kernels.bench ${BENCHMARKS:-} --device cuda --threads 1 --batch ${BATCH:-1 32 256 1024} --latent 64 128 \
    --seconds 0.3 --no-compile --json "$OUT/bench.json"
}

compile() {
  "$PYTHON" -m aar_kernels.bench quantization --device cuda --threads 1 --batch 1 1024 --latent 64 --seconds 0.3 \
    --json "$OUT/compile.json"
}

"$PYTHON" - <<'PYTHON' | tee "$OUT/machine.json"
import json, subprocess, torch
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
try:
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
except OSError as error:
    gpu = str(error)
print(json.dumps({"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}))
PYTHON

for part in ${@:-build tests sanitize generation codec bench compile}; do
  start=$SECONDS
  echo "== $part"
  if "$part" 2>&1 | tee "$OUT/$part.log"; then state=ok; else state=FAILED; failed+=("$part"); fi
  echo "== $part: $state, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
