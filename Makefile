# Two commands for a new user: make demo, make test. Both set up .venv first; a second run builds nothing.
PYTHON ?= python3
CMAKE ?= cmake
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

# Where nvcc is, coldrow is built for CUDA too: here for one architecture, elsewhere for the common ones.
CUDA_ARCHITECTURES ?= 90

SOURCES := $(shell find include bindings python/coldrow -type f -not -name '*.pyc') \
           CMakeLists.txt pyproject.toml

.PHONY: help build demo test test-python test-cpp test-distributed test-fbgemm lint format bench clean

help:
	@echo "make demo    train a click model on real ratings with and without forgetting (1 to 2 minutes)"
	@echo "make test    build, then the Python and the C++ tests"
	@echo "make test-distributed   2 and 4 processes against one, with TorchRec where it can be installed"
	@echo "make test-fbgemm  coldrow.compat.fbgemm beside FBGEMM (its own environment)"
	@echo "make test-torch  one wheel under other torch releases and Pythons (gigabytes)"
	@echo "make test-gpu  what needs a GPU, with nvcc and a torch that are there (no network)"
	@echo "make sanitize  the C++ and Python tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make fuzz    FUZZ_SECONDS (default 60) of libFuzzer and Hypothesis; needs clang with libFuzzer"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  let ruff and clang-format rewrite the sources"
	@echo "make bench   time coldrow against FBGEMM and torch (FBGEMM's environment); ARGS=--quick: few rounds"
	@echo "make bench-curves  time and memory over rows and over indices (9 GB)"
	@echo "make docs    build the site in build/docs, warnings are errors, and test it"
	@echo "make soak    random operations beside the float64 reference, SOAK_MINUTES=2"
	@echo "make faults  200 kills and as many interruptions, each resumed bit for bit"
	@echo "make errors  write docs/errors.md anew from the tests"
	@echo "make plots   draw the pictures of the documents anew"
	@echo "make clean   remove build/ and .venv/"

build: $(VENV)/.installed

$(VENV)/.requirements: requirements-dev.txt constraints.txt requirements-data.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-data.txt
	@touch $@

# Uninstalled first: without build isolation scikit-build-core imports the coldrow that is there (it
# asks every package where its CMake files are), and that may be one that does not import.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	@$(BIN)/python -m pip uninstall -qq -y coldrow
	PATH="$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps \
	    -C cmake.define.COLDROW_WERROR=ON \
	    -C cmake.define.COLDROW_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" .
	@touch $@

# The CUDA module's sources, compiled for the stand-in (tests/cpp/device/simt.hpp). Never installed.
STAND_IN := $(CURDIR)/build/stand-in
$(STAND_IN)/.built: $(VENV)/.requirements $(SOURCES) tests/cpp/device/simt.hpp tests/cpp/device/simt_runtime.hpp
	@mkdir -p $(STAND_IN)
	@PATH="$(BIN):$$PATH" $(CMAKE) -S . -B $(STAND_IN) -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOLDROW_PYTHON=ON \
	    -DCOLDROW_CUDA=OFF -DCOLDROW_STAND_IN=ON -DCOLDROW_WERROR=ON >$(STAND_IN)/configure.log \
	  || { cat $(STAND_IN)/configure.log; exit 1; }
	PATH="$(BIN):$$PATH" $(CMAKE) --build $(STAND_IN) --target stand_in
	@touch $@

demo: build
	$(BIN)/python examples/train_ctr.py $(ARGS)

# The site, in the same environment. Nothing is loaded from elsewhere, neither now nor when it is read.
.PHONY: docs
docs: build $(VENV)/.docs
	@rm -rf build/docs
	$(BIN)/sphinx-build -q -E -W --keep-going -d build/doctrees docs build/docs
	$(BIN)/python -m pytest tests/docs
	@echo "the site: build/docs/index.html"

$(VENV)/.docs: $(VENV)/.requirements requirements-docs.txt
	$(BIN)/python -m pip install -q -r requirements-docs.txt -c constraints.txt
	@touch $@

# The pictures of the documents, from the library.
.PHONY: plots
plots: build
	$(BIN)/python docs/plots.py

test: test-python test-cpp

# The second run goes through the CUDA module on the tests' stand-in for a device.
test-python: build $(STAND_IN)/.built
	COLDROW_STAND_IN=$(STAND_IN)/stand_in $(BIN)/python -m pytest $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest --stand-in $(STAND_IN)/stand_in $(ON_STAND_IN))

BAD_INPUT := $(sort $(wildcard tests/python/robustness/test_bad_*.py)) tests/python/robustness/test_errors_page.py
ON_STAND_IN := $(addprefix tests/python/functional/test_,golden.py properties.py decay.py rounding.py) \
               $(addprefix tests/python/nn/test_,embedding.py compile.py origin.py read_charging.py \
                 $(addprefix module_,forward.py training.py clock.py rows.py under_torch.py)) \
               tests/python/optim $(BAD_INPUT)

# The C++ tests need GoogleTest from the system. Without it this says so and goes on, unless
# COLDROW_REQUIRE_ALL_TESTS is set (as CI does).
test-cpp: build
	@if echo '#include <gtest/gtest.h>' | $${CXX:-c++} -E -x c++ - >/dev/null 2>&1; then \
	  set -e; export PATH="$(BIN):$$PATH"; mkdir -p build/cpp; \
	  $(CMAKE) -S . -B build/cpp -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOLDROW_PYTHON=OFF \
	      -DCOLDROW_TESTS=ON -DCOLDROW_WERROR=ON >build/cpp/configure.log \
	    || { cat build/cpp/configure.log; exit 1; }; \
	  $(CMAKE) --build build/cpp; \
	  ctest --test-dir build/cpp --output-on-failure -j $$(nproc) --quiet -O build/cpp/ctest.log \
	    || { cat build/cpp/ctest.log; exit 1; }; \
	  grep -E '^[0-9]+% tests passed|^Total Test time|\(Skipped\)' build/cpp/ctest.log; \
	elif [ -n "$$COLDROW_REQUIRE_ALL_TESTS" ]; then \
	  echo "error: GoogleTest is not installed: apt-get install libgtest-dev"; exit 1; \
	else \
	  echo "C++ tests NOT run: GoogleTest is not installed. Get it: apt-get install libgtest-dev"; \
	fi

# Under sanitizers, each in a folder of its own. `threads` are the parallel drivers.
.PHONY: sanitize sanitize-cpp sanitize-threads sanitize-python sanitize-leaks
sanitize: sanitize-cpp sanitize-threads sanitize-python sanitize-leaks
SANITIZE := $(CURDIR)/build/sanitize-python
sanitize-cpp: FLAGS := address,undefined,float-cast-overflow
sanitize-threads: FLAGS := thread
sanitize-cpp sanitize-threads: $(VENV)/.requirements
	@set -e; export PATH="$(BIN):$$PATH"; dir=build/$@; mkdir -p $$dir; \
	$(CMAKE) -S . -B $$dir -G Ninja -DCOLDROW_PYTHON=OFF -DCOLDROW_TESTS=ON -DCOLDROW_FUZZ=ON \
	    -DCOLDROW_SANITIZE=$(FLAGS) >$$dir/configure.log || { cat $$dir/configure.log; exit 1; }; \
	$(CMAKE) --build $$dir; \
	ctest --test-dir $$dir --output-on-failure -j $$(nproc) --quiet -O $$dir/ctest.log \
	  || { cat $$dir/ctest.log; exit 1; }; \
	echo "$@: $(FLAGS)"; grep -E '^[0-9]+% tests passed|^Total Test time' $$dir/ctest.log

# The module under AddressSanitizer and UBSan, in an environment on top of .venv. What Python and torch
# keep at exit is not looked at: leaks of the binding are tests/python/robustness/test_leaks.py's. --capture=sys: a
# sanitizer's report, after which the process ends at once, is not caught with the output of a test.
$(SANITIZE)/venv/.installed: $(VENV)/.requirements $(SOURCES)
	$(PYTHON) -m venv --clear $(SANITIZE)/venv
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$(echo $(SANITIZE)/venv/lib/python3*/site-packages)/below.pth
	PATH="$(BIN):$$PATH" $(SANITIZE)/venv/bin/python -m pip install -q --no-build-isolation --no-deps \
	    --ignore-installed -C build-dir=build/sanitize-python/wheel \
	    -C cmake.define.COLDROW_CUDA=OFF \
	    -C cmake.define.COLDROW_SANITIZE=address,undefined,float-cast-overflow .
	@touch $@

SANITIZED_TESTS ?= $(BAD_INPUT) $(addprefix tests/python/robustness/test_,$(addsuffix .py,array_memory \
                     arbitrary_arguments extreme_gaps_and_sizes processes)) tests/python/nn/test_autograd_versions.py
sanitize-python: $(SANITIZE)/venv/.installed
	@echo "sanitize-python: address,undefined,float-cast-overflow"
	@LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0 \
	UBSAN_OPTIONS=print_stacktrace=1 COLDROW_FUZZ_EXAMPLES=20 PYTHONMALLOC=malloc \
	    $(SANITIZE)/venv/bin/python -m pytest --capture=sys --hypothesis-seed=1 $(SANITIZED_TESTS) $(ARGS)

sanitize-leaks: build
	COLDROW_LEAK_CALLS=100000 $(BIN)/python -m pytest tests/python/robustness/test_leaks.py $(ARGS)

FUZZ_SECONDS ?= 60
.PHONY: fuzz
fuzz: build
	@set -e; export PATH="$(BIN):$$PATH"; mkdir -p build/fuzz; \
	$(CMAKE) -S . -B build/fuzz -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DCOLDROW_PYTHON=OFF \
	    -DCOLDROW_FUZZ=ON -DCOLDROW_SANITIZE=address,undefined,float-cast-overflow \
	    >build/fuzz/configure.log || { cat build/fuzz/configure.log; exit 1; }; \
	$(CMAKE) --build build/fuzz; \
	tests/fuzz/run.sh build/fuzz $(FUZZ_SECONDS) $(BIN)/python

# TorchRec lives in an environment of its own, on top of .venv (its torch and coldrow are seen through a
# .pth file). --no-deps: its requirements name another build of FBGEMM. Where it cannot be had, the tests
# without it still run, unless COLDROW_REQUIRE_TORCHREC is set (as CI does).
DISTRIBUTED := $(CURDIR)/build/distributed-venv
$(DISTRIBUTED)/.installed: requirements-torchrec.txt $(VENV)/.requirements
	$(PYTHON) -m venv --clear $(DISTRIBUTED)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    > $$(echo $(DISTRIBUTED)/lib/python3*/site-packages)/below.pth
	$(DISTRIBUTED)/bin/python -m pip install -q --no-deps -r requirements-torchrec.txt && touch $@ \
	  || { [ -z "$$COLDROW_REQUIRE_TORCHREC" ] && echo "TorchRec NOT installed: its tests will not run"; }

test-distributed: build $(DISTRIBUTED)/.installed
	OMP_NUM_THREADS=1 $(DISTRIBUTED)/bin/python -m pytest tests/distributed $(ARGS)

# Many more kills and interruptions than the tests make: figures for docs/reliability.md.
.PHONY: faults
faults: build
	COLDROW_FAULTS=200 $(BIN)/python -m pytest -s -W ignore tests/python/robustness/test_interrupts.py \
	    tests/python/robustness/test_checkpoint_files.py -k "interrupted or killed"

# docs/errors.md, from what the tests were refused.
.PHONY: errors
errors: build
	COLDROW_WRITE_ERRORS=1 $(BIN)/python -m pytest $(BAD_INPUT)

# Random operations on 20 tables beside the float64 reference; docs/reliability.md has an hour of it.
SOAK_MINUTES ?= 2
.PHONY: soak
soak: build
	$(BIN)/python tests/python/robustness/soak.py --minutes $(SOAK_MINUTES) $(ARGS)

# One wheel under other torch releases and Pythons: tests/torch_releases.sh says how.
.PHONY: test-torch
test-torch: build
	tests/torch_releases.sh $(ARGS)

.PHONY: test-gpu
test-gpu:
	tests/gpu.sh

CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.hpp' '*.cpp' '*.cu' '*.cuh')

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: build
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(CPP_FILES)

# coldrow.compat.fbgemm beside FBGEMM itself: the same training, and FBGEMM's own tests of
# ROWWISE_RMSPROP_AR where FBGEMM_SOURCE names a checkout of its repository (its wheel has none).
# Each FBGEMM wants one torch. 1.9.0 has that optimizer; its torch is by default the CUDA build, some
# gigabytes. FBGEMM_VERSION=1.8.0 is smaller, has the others, and comes with TorchRec 1.8, whose fused
# kernels are then run on the stand-in.
FBGEMM_VERSION ?= 1.9.0
TORCHREC_FOR_1.8.0 := torchrec==1.8.0 torchmetrics==1.0.3 tensordict pyvers cloudpickle tqdm \
                      pyre-extensions typing-inspect mypy-extensions lightning-utilities packaging
TORCH_OF_1.8.0 := 2.13.0
TORCH_OF_1.9.0 := 2.14.0
FBGEMM := $(CURDIR)/build/fbgemm-$(FBGEMM_VERSION)
$(FBGEMM)/.requirements:
	$(PYTHON) -m venv $(FBGEMM)
	$(FBGEMM)/bin/python -m pip install -q torch==$(TORCH_OF_$(FBGEMM_VERSION)) numpy hypothesis pytest
	$(FBGEMM)/bin/python -m pip install -q --no-deps fbgemm-gpu-cpu==$(FBGEMM_VERSION) \
	    $(TORCHREC_FOR_$(FBGEMM_VERSION))
	@touch $@

$(FBGEMM)/.installed: $(FBGEMM)/.requirements $(VENV)/.requirements $(SOURCES)
	PATH="$(BIN):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps \
	    -C cmake.define.COLDROW_WERROR=ON -C cmake.define.COLDROW_CUDA=OFF -w $(FBGEMM)/wheel .
	$(FBGEMM)/bin/python -m pip install -q --no-deps --force-reinstall $(FBGEMM)/wheel/coldrow-*.whl
	@touch $@

# FBGEMM 1.9 finds the CPU's instruction sets only with torch's libc10 loaded first.
test-fbgemm: $(FBGEMM)/.installed
	@set -e; export LD_PRELOAD="$$(ls $(FBGEMM)/lib/python3.*/site-packages/torch/lib/libc10.so)"; \
	$(FBGEMM)/bin/python -m pytest -p no:warnings tests/fbgemm $(ARGS); \
	$(FBGEMM)/bin/python tests/fbgemm/theirs.py --build $(FBGEMM)/tests --real; \
	$(FBGEMM)/bin/python tests/fbgemm/theirs.py --build $(FBGEMM)/tests

# Beside FBGEMM, in the same environment; where that cannot be had (it is gigabytes), in .venv without it.
BENCH = $(if $(wildcard $(FBGEMM)/.requirements),$(FBGEMM),$(VENV))/bin/python
bench: build
	@$(MAKE) --no-print-directory $(FBGEMM)/.installed \
	  || echo "FBGEMM NOT installed: benchmarks run in .venv, without it"
	@[ ! -e $(FBGEMM)/.requirements ] || $(MAKE) --no-print-directory $(FBGEMM)/.plots \
	  || echo "matplotlib NOT installed: no plot"
	@$(MAKE) --no-print-directory bench-run

# (A make of its own, which sees what the one before has made.)
.PHONY: bench-run bench-curves
bench-run:
	$(BENCH) benchmarks/cpu.py --json build/bench/cpu.json --plot build/bench/cpu.svg $(ARGS)

$(FBGEMM)/.plots: $(FBGEMM)/.requirements
	$(FBGEMM)/bin/python -m pip install -q matplotlib
	@touch $@

bench-curves: build
	$(BIN)/python benchmarks/curves.py $(ARGS)

clean:
	rm -rf build .venv
