#!/usr/bin/env bash
# Runs the fuzzers of a build and the Python one, side by side, for some seconds.
#     run.sh BUILD SECONDS PYTHON
# What is found stays in BUILD/found (the input) and in .hypothesis; new inputs go to BUILD/corpus.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$(realpath "$1") seconds=$2 python=$3
export UBSAN_OPTIONS=print_stacktrace=1
mkdir -p "$build/found"

fuzz() { # name, seconds
  mkdir -p "$build/corpus/$1"
  "$build/tests/fuzz/$1_fuzz" -max_total_time="$2" -max_len=2000 -entropic=0 -timeout=60 -rss_limit_mb=3000 \
    -artifact_prefix="$build/found/$1-" -print_final_stats=1 -seed="${FUZZ_SEED:-0}" \
    "$build/corpus/$1" "$here/corpus/$1" >"$build/$1.log" 2>&1 || { tail -60 "$build/$1.log"; return 1; }
  echo "$1: $(grep -E '^#[0-9]+.*DONE' "$build/$1.log" | tail -1)"
}

python_fuzz() { # Another seed each time round, from FUZZ_SEED on if it is set.
  local end=$((SECONDS + $1)) rounds=0
  while [ "$SECONDS" -lt "$end" ]; do
    COLDROW_FUZZ_EXAMPLES=100 "$python" -m pytest -x -p no:cacheprovider \
      --hypothesis-seed="$((${FUZZ_SEED:-$RANDOM} + rounds))" \
      "$here/../python/robustness/test_arbitrary_arguments.py" >"$build/python.log" 2>&1 \
      || { cat "$build/python.log"; return 1; }
    rounds=$((rounds + 1))
  done
  echo "python: $rounds rounds of 100 calls of each function"
}

python_fuzz "$seconds" &
fuzz checks $((seconds / 8 + 1))
fuzz kernels $((seconds - seconds / 8))
wait $!
