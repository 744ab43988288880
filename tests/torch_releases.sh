#!/usr/bin/env bash
# One wheel, built once, under several torch releases, with NumPy alone, and under other Pythons.
#
#     tests/torch_releases.sh [release ...]        (make test-torch)
#
# The wheel is for the stable ABI of Python 3.10 and later. Each torch release gets an environment of its own in
# build/torch-<release>, kept for the next run; it brings gigabytes where the package index has only torch's
# CUDA builds. A release that cannot be installed is left out with a line that says so. Other Pythons are those
# found on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
releases=("$@")
[ ${#releases[@]} -gt 0 ] || releases=(2.15.0 2.9.1)
python=.venv/bin/python
log=build/torch-releases.log

rm -rf build/torch-wheel
$python -m pip install -q -c constraints.txt nanobind-backend 2>>"$log"
PATH="$PWD/.venv/bin:$PATH" $python -m pip wheel -q --no-build-isolation --no-deps \
  -C wheel.py-api=cp310 -C cmake.define.COLDROW_CUDA=OFF -C build-dir=build/torch-wheel-build -w build/torch-wheel . 2>>"$log"
wheel=$(echo build/torch-wheel/coldrow-*.whl)
tests=(tests/python/nn/test_{module_*,autograd_versions,embedding,compile}.py
  tests/python/optim/test_sparse_optimizer{,_checkpoint}.py
  tests/python/robustness/test_{array_memory,processes}.py)

for release in numpy "${releases[@]}"; do
  env=build/torch-$release
  if [ ! "$env/.installed" -nt tests/torch_releases.sh ]; then
    python3 -m venv "$env"
    packages=(numpy pytest hypothesis ml_dtypes mpmath safetensors nanobind-backend)
    [ "$release" = numpy ] || packages+=("torch==$release")
    if ! "$env/bin/python" -m pip install -q "${packages[@]}" 2>>"$log"; then
      echo "torch $release: could not be installed here (see $log), NOT run"
      rm -rf "$env"
      continue
    fi
    touch "$env/.installed"
  fi
  "$env/bin/python" -m pip install -q --no-deps --force-reinstall "$wheel" 2>>"$log"
  run=("${tests[@]}")
  [ "$release" != numpy ] || run=(tests/python/functional/test_policies.py tests/python/functional/test_decay.py)
  echo "torch $release: $(sha256sum <"$wheel" | cut -c1-12)"
  # From elsewhere, so that the wheel is what is imported.
  "$env/bin/python" -m pytest -p no:cacheprovider "${run[@]}" >"$env/pytest.log" 2>&1 ||
    { cat "$env/pytest.log"; exit 1; }
  tail -n 1 "$env/pytest.log"
done

for minor in 10 11 12 13 14; do
  if ! "python3.$minor" -c pass 2>/dev/null; then
    echo "python3.$minor: not found, not run"
    continue
  fi
  env=build/python-3.$minor
  if [ ! "$env/.installed" -nt tests/torch_releases.sh ]; then
    "python3.$minor" -m venv "$env"
    "$env/bin/python" -m pip install -q numpy pytest mpmath nanobind-backend 2>>"$log"
    touch "$env/.installed"
  fi
  "$env/bin/python" -m pip install -q --no-deps --force-reinstall "$wheel" 2>>"$log"
  "$env/bin/python" -m pytest -p no:cacheprovider tests/python/functional/test_policies.py \
    tests/python/functional/test_decay.py >"$env/pytest.log" 2>&1 || { cat "$env/pytest.log"; exit 1; }
  echo "python3.$minor: $(tail -n 1 "$env/pytest.log")"
done
