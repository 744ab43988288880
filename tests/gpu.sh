#!/usr/bin/env bash
# All that needs a GPU, from a bare checkout and without a network: builds the wheel and the CUDA programs for
# the GPU that is here, runs them, the tests in tests/cuda, and compute-sanitizer on a part. Under 8 minutes.
#
#     tests/gpu.sh                            PYTHON=python3: the Python that has torch
#     COLDROW_TEST_DEVICE=cpu tests/gpu.sh    a dry run without a GPU: what can be built and run is
#
# It needs a GPU, nvcc, CMake, a C++ compiler, and in Python: torch with CUDA, numpy, pytest, scikit-build-core,
# nanobind (2.2 or later), ninja. With hypothesis, CuPy and compute-sanitizer more is run. Nothing is installed
# into that Python: the wheel goes to build/gpu/site. Logs: build/gpu/*.log.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$PWD/build/gpu
device=${COLDROW_TEST_DEVICE:-cuda}
mkdir -p "$out"
begin=$SECONDS

say() { printf '[%3d s] %s\n' $((SECONDS - begin)) "$*"; }
give_up() {
  say "gpu.sh FAILED: $*"
  exit 1
}
# Runs a command into a log; shows the log's end where it fails.
run() {
  local what=$1
  shift
  local log=$out/${what// /-}.log
  if "$@" >"$log" 2>&1; then
    say "$what: $(grep -vE '^\s*$' "$log" | tail -n 1 | cut -c1-150)"
  else
    local code=$?
    tail -n 60 "$log"
    failed+=("$what")
    say "$what: FAILED (exit code $code, $log)"
    return $code
  fi
}

# ------------------------------------------------------------------------------------ what there is

PATH=$PATH:/usr/local/cuda/bin
missing=() failed=() not_run=()
command -v nvcc >/dev/null || missing+=("nvcc: install the CUDA toolkit, or put its bin folder on PATH")
command -v cmake >/dev/null || missing+=("cmake, 3.22 or later")
command -v "${CXX:-c++}" >/dev/null || missing+=("a C++20 compiler: ${CXX:-c++} was not found")
if ! command -v "$python" >/dev/null; then
  missing+=("Python: $python was not found; PYTHON says which to use")
else
  for module in torch numpy pytest scikit_build_core nanobind; do
    "$python" -c "import $module" 2>/dev/null || missing+=("the Python package ${module//_/-} (of $python)")
  done
  "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
    missing+=("Python's headers (of $python): Debian and Ubuntu have them in python3-dev")
  if ! "$python" -c 'import ninja' 2>/dev/null && ! command -v ninja >/dev/null; then
    missing+=("ninja")
  fi
fi
capability=90
if [ "$device" = cuda ] && [ ${#missing[@]} -eq 0 ]; then
  capability=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("%d%d" % torch.cuda.get_device_capability())')
  if [ -z "$capability" ]; then
    if ! "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
      missing+=("torch with CUDA: $python has a CPU build of it")
    elif ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
      missing+=("a GPU: nvidia-smi shows none")
    else
      missing+=("a GPU that torch can use: torch.cuda.is_available() is False")
    fi
  fi
fi
if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}"
  say "gpu.sh: nothing was run"
  exit 2
fi
if [ "$device" = cuda ]; then
  "$python" -c '
import torch
p = torch.cuda.get_device_properties(0)
print(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory >> 30} GiB; torch {torch.__version__}")'
  nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed 's/^/driver /'
else
  say "a dry run on the CPU: no GPU is used"
fi
nvcc --version | tail -n 2 | head -n 1

# --------------------------------------------------------------------------------------------- build

# Two builds at once: the wheel, and programs that need neither Python nor GoogleTest.
cpp() {
  cmake -S tests/cuda -B "$out/cpp" -DCOLDROW_TEST_ARCHITECTURES="$capability" &&
    cmake --build "$out/cpp" --parallel 4
}
wheel() {
  rm -rf "$out/site"
  "$python" -m pip install --no-index --no-build-isolation --no-deps --target "$out/site" \
    -C build-dir="$out/wheel" -C cmake.define.COLDROW_CUDA=ON \
    -C cmake.define.COLDROW_CUDA_ARCHITECTURES="$capability" .
}
run "build of programs" cpp &
cpp_job=$!
run "build of the wheel" wheel
wheel_code=$?
wait $cpp_job
cpp_code=$?
[ $cpp_code -eq 0 ] || give_up "the CUDA programs do not build"
[ $wheel_code -eq 0 ] || give_up "the wheel does not build"
export PYTHONPATH=$out/site${PYTHONPATH:+:$PYTHONPATH}
python_in() { (cd "$out" && "$python" -W ignore "$@"); } # from elsewhere, so that the wheel is imported
python_in -m coldrow info >"$out/info.log" 2>&1 || give_up "the wheel does not import: $(tail -n 3 "$out/info.log")"
grep '^cuda' "$out/info.log"
if [ "$device" = cuda ] && ! python_in -c 'import sys, coldrow; sys.exit(not coldrow.cuda.is_available())'; then
  give_up "coldrow.cuda.is_available() is False on a machine with a GPU"
fi

# ----------------------------------------------------------------------------------------------- run

run "programs" ctest --test-dir "$out/cpp" --output-on-failure --timeout 200
if [ "$device" = cuda ] && grep -qE 'Skipped|Not Run' "$out/programs.log"; then
  failed+=("programs that were skipped, though there is a GPU")
fi
"$python" -c 'import hypothesis' 2>/dev/null || not_run+=("property tests: hypothesis is not installed")
"$python" -c 'import cupy' 2>/dev/null || not_run+=("CuPy's test: CuPy is not installed")
tests=("$python" -m pytest -p no:cacheprovider -rs)
run "tests of the wheel" timeout 270 "${tests[@]}" tests/cuda

# sanitize TOOL SECONDS WHAT PROGRAM...: fails too where the tool has not seen the program. (What calls of CUDA
# return is looked at by the programs; torch makes some that are meant to fail.)
sanitize() {
  local tool=$1 what="$1 of the $3"
  local options=(--tool "$tool" --target-processes all --error-exitcode 9)
  [ "$tool" != memcheck ] || options+=(--report-api-errors no)
  run "$what" timeout "$2" compute-sanitizer "${options[@]}" "${@:4}" || return
  grep -q 'SUMMARY: 0 ' "$out/${what// /-}.log" || failed+=("$what: its log has no summary")
}

if [ "$device" != cuda ]; then
  not_run+=("compute-sanitizer: a dry run")
elif ! command -v compute-sanitizer >/dev/null; then
  not_run+=("compute-sanitizer: not found")
else
  # The drivers on small batches: all kernels, all paths through them.
  for tool in memcheck racecheck initcheck; do
    sanitize $tool 150 drivers "$out/cpp/drivers_gpu" --quick \
      updates odd_sizes lookups views repeats refusals uploads graphs
  done
  # Through Python, with each allocation one of the driver's, so that its bounds are known.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck 150 wheel "${tests[@]}" tests/cuda/test_cuda_module.py \
    -k "one_index or empty or weights or rows_and_state"
fi

# ------------------------------------------------------------------------------------------- the end

for line in "${not_run[@]}"; do say "NOT run: $line"; done
if [ ${#failed[@]} -gt 0 ]; then
  give_up "$(printf '%s; ' "${failed[@]}")"
fi
say "gpu.sh: all passed on $device${not_run[0]+, ${#not_run[@]} parts NOT run, see above}"
