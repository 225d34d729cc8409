# `make` or `make help` lists what there is.

PYTHON ?= python3
VENV ?= .venv
# Extra arguments for pip where it installs torch, such as another index.
TORCH_ARGS ?=
# Arguments for `make demo`, for what reads texts in `make bench` (--data FILE), and for pytest in
# `make test` and `make test-slow`.
ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
# One thread per test process: several processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q
NATIVE_SOURCES := setup.py CMakeLists.txt MANIFEST.in $(shell find kernels/csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-quick test test-slow test-install test-sanitize fuzz bench bench-full bench-gpu \
  bench-compare bench-report bench-instructions lint format clean

help:
	@echo "moe_fast: make <target>. The first one to run sets everything up in $(VENV)."
	@echo
	@echo "  setup        $(VENV) with torch $(shell sed -n 's/^torch==//p' constraints.txt), moe_fast and all tools (done once; again when the build changes)"
	@echo "  demo         upcycle, fine-tune and compare on real text, up to 20 minutes on two cores; ARGS=... for more"
	@echo "  demo-quick   the same on little data, about 3 minutes"
	@echo "  test         the tests but the slow ones; ARGS='-k plan' and the like go to pytest"
	@echo "  test-slow    the slow tests"
	@echo "  test-install   wheels, sdist and editable installs, with and without compilers, in fresh environments"
	@echo "  test-hostile   a thousand bad inputs and forty kills; how many errors are clear"
	@echo "  test-sanitize  the native library's tests on a build with address and undefined-behaviour sanitizers,"
	@echo "                 and the CUDA kernels' code run on the CPU under these and the thread sanitizer"
	@echo "  fuzz         random problems and random nonsense for the native library, for 10 minutes"
	@echo "  bench        every operation beside its peers, with pictures: bench/results/local"
	@echo "  bench-full   the same with more and larger shapes, an hour or two"
	@echo "  bench-gpu    the Triton kernels, on an NVIDIA GPU; ARGS=--dry-run needs none"
	@echo "  bench-compare  the last run against the committed one; fails where a case became slower"
	@echo "  bench-report the page of the docs, from the committed runs"
	@echo "  bench-instructions  instructions of the compiled library, counted by valgrind"
	@echo "  lint         ruff (rules and format) and mypy"
	@echo "  format       let ruff mend what it can"
	@echo "  clean        remove what was built, $(VENV) included"
	@echo
	@echo "  PYTHON=python3.12    another Python for $(VENV), 3.11 or newer"
	@echo "  TORCH_ARGS='--index-url https://download.pytorch.org/whl/cpu'"
	@echo "                       the CPU-only torch, a much smaller download on Linux"
	@echo "  MOE_FAST_NATIVE=0|1  leave the compiled library out, or insist on it (default: where it can be built)"
	@echo "  WORKERS=2            processes for the tests"

setup: $(VENV)/.ready

# torch alone and first, by the constraints file: nothing later gets to choose another one.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moe_fast needs Python 3.11 or newer, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) -c constraints.txt torch
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES)
	$(PIP) "setuptools>=77" "cmake>=3.21" ninja
	@if [ "$$CI" = true ] && ! command -v nvcc >/dev/null; then \
	   MOE_FAST_NATIVE=0 $(PIP) -c constraints.txt --no-build-isolation -e ".[cuda-build]"; fi
	$(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"
	@if [ -e moe_fast/_native_cuda.so ]; then echo "moe_fast: the native library is built, for CPU and CUDA."; \
	 elif [ -e moe_fast/_native.so ]; then echo "moe_fast: the native library is built, for the CPU (no nvcc)."; \
	 else echo "moe_fast: no native library; pip install -v --no-build-isolation -e . says why."; fi
	@touch $@

demo: setup
	$(PY) -m moe_fast.demo $(ARGS)

demo-quick: setup
	$(PY) -m moe_fast.demo --quick $(ARGS)

test: setup
	$(PYTEST) -n $(WORKERS) -m "not slow" $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-install: setup
	$(PYTEST) $(ARGS) tests/test_packaging.py

.PHONY: test-hostile
test-hostile: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.hostile $(ARGS)

# The C++ half once more, built to stop at the first bad access or undefined operation. Python itself
# is not built so, hence the preloaded runtime; it frees little at exit, hence no leak check.
SANITIZE := build/sanitize
test-sanitize: setup
	$(VENV)/bin/cmake -S . -B $(SANITIZE) -DMOE_SANITIZE=ON -DMOE_CUDA=OFF -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(PY) -DMOE_OUTPUT_DIR=$(CURDIR)/$(SANITIZE)/lib
	$(VENV)/bin/cmake --build $(SANITIZE) --parallel $(WORKERS)
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  MOE_FAST_NATIVE_LIBRARY=$(CURDIR)/$(SANITIZE)/lib/_native.so CI=true \
	  $(PYTEST) -k "not compiles and not other_processors" $(ARGS) tests/ops/test_plan_cpp.py \
	  tests/ops/test_gather_rows.py tests/ops/test_combine_rows.py \
	  tests/ops/test_expert_mlp_cpp.py tests/ops/test_expert_linear_cpp.py tests/ops/test_route_cpp.py \
	  tests/ops/test_attention_cpp.py
	CI=true $(PYTEST) $(ARGS) tests/ops/test_cuda_kernels.py

# FUZZ_SEED=... repeats a run.
FUZZ_SECONDS ?= 600
fuzz: setup
	$(PY) -P -m tests.ops.fuzz --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

# RESULT: where a run is written to; BENCH_ARGS: such as `--seconds 1`, or names of operations.
RESULT ?= bench/results/local/bench.json
BENCH := $(PY) -m bench --json $(RESULT) $(BENCH_ARGS)
LOCAL := bench/results/local
bench: setup
	$(BENCH)
	$(PY) -m bench.expert_mlp --rounds 3 --json $(LOCAL)/expert_mlp.json
	$(PY) -m bench.dispatch --json $(LOCAL)/dispatch.json
	$(PY) -m bench.embedding --texts 64 --rounds 3 $(ARGS) --json $(LOCAL)/embedding.json
	$(PY) -m bench.natural_step --batch 16 --rounds 3 $(ARGS) --json $(LOCAL)/natural_step.json
	$(PY) -m bench.contrastive_loss --batch 2048 --rounds 3 --json $(LOCAL)/contrastive_loss.json
	$(PY) -m bench.report --results $(LOCAL) --output $(LOCAL)/benchmarks.md

# The tables of the docs, in their full sizes: an hour or two.
bench-full: setup
	$(BENCH) --size full
	$(PY) -m bench.expert_mlp --json $(LOCAL)/expert_mlp.json
	$(PY) -m bench.import_time --json $(LOCAL)/import_time.json
	$(PY) -m bench.dispatch --json $(LOCAL)/dispatch.json
	$(PY) -m bench.memory --json $(LOCAL)/memory.json
	$(PY) -m bench.embedding $(ARGS) --json $(LOCAL)/embedding.json
	$(PY) -m bench.natural_step $(ARGS) --json $(LOCAL)/natural_step.json
	$(PY) -m bench.cached_step --json $(LOCAL)/cached_step.json
	$(PY) -m bench.contrastive_loss --large 65536 --json $(LOCAL)/contrastive_loss.json
	$(PY) -m bench.report --results $(LOCAL) --output $(LOCAL)/benchmarks.md

bench-gpu: setup
	$(PY) -m bench.gpu $(ARGS)

# Exit code 1: a case became slower. AGAINST: the committed run to hold RESULT against.
AGAINST ?= $(lastword $(sort $(wildcard bench/results/cpu-*.json)))
bench-compare: setup
	@test -n "$(AGAINST)" || { echo "bench-compare: no committed run; name one: AGAINST=FILE" >&2; exit 2; }
	$(PY) -m bench.compare $(AGAINST) $(RESULT)

# The page of the docs, from the committed runs.
bench-report: setup
	$(PY) -m bench.report

bench-instructions: setup
	$(PY) -m bench.instructions --json bench/results/local/instructions.json $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info moe_fast/_native*.so
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
