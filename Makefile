# `make` or `make help` lists what there is.

# Which releases of what we depend on: locked (constraints.txt), oldest (constraints-oldest.txt: our
# lower bounds) or newest (what PyPI serves within our upper bounds). Each set has its own environment.
RELEASES ?= locked
LOCK_locked := constraints-torch.txt constraints.txt
LOCK_oldest := constraints-oldest.txt
LOCK_newest :=
ifeq ($(origin LOCK_$(RELEASES)),undefined)
  $(error RELEASES must be locked, oldest or newest; got '$(RELEASES)')
endif
LOCK := $(LOCK_$(RELEASES))
# Packages to upgrade past our bounds, to see what their next releases break: BEYOND="transformers peft".
BEYOND ?=
PYTHON ?= $(if $(filter oldest,$(RELEASES)),python3.11,python3)
VENV ?= .venv$(if $(filter locked,$(RELEASES)),,-$(RELEASES))
# Extra arguments for pip where it installs torch, such as another index.
TORCH_ARGS ?=
# Arguments for `make demo`, for `make bench` (such as --data FILE), and for pytest in `make test` and
# `make test-slow`.
ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
LOCKED := $(PIP) $(addprefix -c ,$(LOCK)) $(if $(LOCK),,--upgrade --upgrade-strategy eager)
# One thread per test process: several processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q
NATIVE_SOURCES := setup.py CMakeLists.txt MANIFEST.in $(shell find kernels/csrc -type f)

.DEFAULT_GOAL := help
.PHONY: look-again help setup lock wheel demo demo-quick test test-oldest test-newest test-python test-slow test-kernels test-install test-sanitize fuzz bench bench-full bench-gpu \
  bench-compare bench-report bench-instructions lint lint-schemas docs format clean

help:
	@echo "moe_fast: make <target>. The first one to run sets everything up in $(VENV)."
	@echo
	@echo "  setup        $(VENV) with torch $(shell sed -n 's/^torch==//p' constraints-torch.txt), moe_fast and all tools (done once; again when the build changes)"
	@echo "  demo         upcycle, fine-tune and compare on real text, up to 20 minutes on two cores; ARGS=... for more"
	@echo "  demo-quick   the same on little data, about 3 minutes"
	@echo "  test         the tests but the slow ones; ARGS='-k plan' and the like go to pytest"
	@echo "  test-oldest, test-newest   the same with the oldest releases that we support (on Python 3.11), and with"
	@echo "               the newest of PyPI; BEYOND='transformers peft' goes past our upper bounds for these. Slow:"
	@echo "               each has its own environment, $(VENV)-oldest and $(VENV)-newest"
	@echo "  test-python  the same in $(VENV)-PYTHON, on another Python: make test-python PYTHON=python3.12"
	@echo "  test-slow    the slow tests, but those of the next targets"
	@echo "  test-kernels   the slow tests of the Triton kernels: interpreted, and compiled for four GPUs; many minutes"
	@echo "  test-install   wheels, sdist and editable installs, with and without compilers, in fresh environments"
	@echo "  test-mpnet     a real encoder of 110 M parameters, which is downloaded: 404 MB"
	@echo "  test-hostile   a thousand bad inputs and forty kills; how many errors are clear"
	@echo "  test-serving   the server's description against five minutes of what schemathesis thinks of"
	@echo "  test-stores  what embed writes, in LanceDB, Qdrant and a PostgreSQL with pgvector, which is started"
	@echo "  bench-serving  the server beside a plain handler, under 64 clients for a minute each"
	@echo "  test-sanitize  the native library's tests on a build with address and undefined-behaviour sanitizers,"
	@echo "                 and the CUDA kernels' code run on the CPU under these and the thread sanitizer"
	@echo "  fuzz         random problems and random nonsense for the native library, for 10 minutes"
	@echo "  bench        every operation beside its peers, with pictures: bench/results/local"
	@echo "  bench-full   the same with more and larger shapes, hours"
	@echo "  bench-gpu    the Triton kernels, on an NVIDIA GPU, in the parts that ARGS names (docs/kernels.md);"
	@echo "               ARGS=--rehearse only compiles and ARGS=--dry-run interprets: they need no GPU"
	@echo "  bench-compare  the last run against the committed one; fails where a case became slower"
	@echo "  bench-report the page of the docs, from the committed runs"
	@echo "  bench-instructions  instructions of the compiled library, counted by valgrind"
	@echo "  lint         ruff (rules and format), mypy, import-linter (imports go down the floors only), and"
	@echo "               the schemas of GitHub's files and CITATION.cff"
	@echo "  docs         the site of these pages and of the docstrings, in build/site; fails at a broken link"
	@echo "  format       let ruff mend what it can"
	@echo "  wheel        an sdist and a manylinux wheel in dist, checked"
	@echo "  lock         write constraints.txt and constraints-oldest.txt anew, from pyproject.toml"
	@echo "  clean        remove what was built, $(VENV) included"
	@echo
	@echo "  PYTHON=python3.12    another Python for $(VENV), 3.11 or newer"
	@echo "  RELEASES=oldest|newest  for any target: with these releases, in an environment of their own"
	@echo "  TORCH_ARGS='--index-url https://download.pytorch.org/whl/cpu'"
	@echo "                       the CPU-only torch, a much smaller download on Linux"
	@echo "  MOE_FAST_NATIVE=0|1  leave the compiled library out, or insist on it (default: where it can be built)"
	@echo "  WORKERS=2            processes for the tests"

setup: $(VENV)/.ready

# torch alone and first: nothing later gets to choose another one. What is newest changes from day to day.
$(VENV)/.torch: $(LOCK) $(if $(LOCK),,look-again)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moe_fast needs Python 3.11 or newer, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) $(TORCH_ARGS) $(shell grep -o '"torch>=[^"]*"' pyproject.toml)
	@touch $@

# nvcc where CI needs it: the GPU's kernels are compiled there, without a GPU.
$(VENV)/.ready: $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES)
	$(LOCKED) setuptools cmake ninja \
	  $(if $(filter true,$(CI)),$(shell command -v nvcc >/dev/null || grep -o '"nvidia-[^"]*"' pyproject.toml))
	$(LOCKED) --no-build-isolation -e ".[dev]"
	$(if $(BEYOND),$(PIP) --upgrade $(BEYOND))
	@if [ -e moe_fast/_native_cuda.so ]; then echo "moe_fast: the native library is built, for CPU and CUDA."; \
	 elif [ -e moe_fast/_native.so ]; then echo "moe_fast: the native library is built, for the CPU (no nvcc)."; \
	 else echo "moe_fast: no native library; $(PY) -m pip install -v --no-build-isolation -e . says why."; fi
	@touch $@

wheel: setup
	rm -rf dist
	.ci/wheel $(abspath $(PY)) dist

# uv resolves, for every Python and platform at once or for the lower bounds; pip installs.
COMPILE := build/uv/bin/uv pip compile pyproject.toml --quiet --upgrade --python-version 3.11 --extra dev --extra docs \
  --no-annotate --custom-compile-command "make lock"
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(COMPILE) --universal -c constraints-torch.txt -o constraints.txt
	$(COMPILE) --python-platform linux --resolution lowest-direct -o constraints-oldest.txt
	sed -E -i.bak '/^(cuda|nvidia)-/d' constraints.txt constraints-oldest.txt
	sed -E -i.bak '/^(torch|triton)=/d' constraints.txt
	rm constraints.txt.bak constraints-oldest.txt.bak

demo: setup
	$(PY) -m moe_fast.demo $(ARGS)

demo-quick: setup
	$(PY) -m moe_fast.demo --quick $(ARGS)

test: setup
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-oldest:
	$(MAKE) test RELEASES=oldest

test-newest:
	$(MAKE) test RELEASES=newest

test-python:
	$(MAKE) test VENV=$(VENV)-$(notdir $(PYTHON))

# Whole files that have a target of their own are left to it. Tests go to the processes one by one,
# for they take from seconds to a minute.
CUDA_ON_CPU := tests/ops/test_cuda_kernels.py
TRITON := tests/triton_ops
INSTALLS := tests/test_installs.py
test-slow: setup
	$(PYTEST) -n $(WORKERS) --maxschedchunk 1 -m slow --ignore $(CUDA_ON_CPU) --ignore $(TRITON) --ignore $(INSTALLS) --ignore $(STORES) $(ARGS)

test-kernels: setup
	$(PYTEST) -n $(WORKERS) --maxschedchunk 1 -m slow $(TRITON) $(ARGS)

test-install: setup
	$(PYTEST) $(ARGS) tests/test_packaging.py tests/test_installs.py

# The model is 438 MB and downloaded once; see experiments/mpnet.py.
.PHONY: test-mpnet
MPNET := build/all-mpnet-base-v2
test-mpnet: setup
	test -d $(MPNET) || $(PY) -m experiments.mpnet $(MPNET)
	MOE_FAST_MPNET=$(MPNET) $(PYTEST) $(ARGS) tests/test_mpnet.py

.PHONY: test-hostile
test-hostile: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.hostile $(ARGS)

# The server under 64 clients, with ones that hang or send garbage and a killed worker; some minutes.
.PHONY: bench-serving
bench-serving: setup
	$(PY) -m bench.serving --kinds odd --clients 64 --seconds 60 --trouble --workers 2 -o $(LOCAL)/load.json $(ARGS)

.PHONY: test-serving
# SERVING_SECONDS: of schemathesis, which asks for all that the server's description allows, and more.
SERVING_SECONDS ?= 300
test-serving: setup
	$(PIP) --quiet $(addprefix -c ,$(LOCK)) $(shell grep -o '"schemathesis[^"]*"' pyproject.toml)
	$(PY) -m tests.serving.fuzz --seconds $(SERVING_SECONDS)

.PHONY: test-stores
STORES := tests/stores
test-stores: setup
	$(PIP) --quiet $(addprefix -c ,$(LOCK)) $(shell grep -oE '"(psycopg|pgvector|pixeltable|qdrant)[^"]*"' pyproject.toml)
	$(PYTEST) $(ARGS) $(STORES) tests/examples -k store

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
	  $(PYTEST) -n $(WORKERS) -k "not compiles and not opcheck" $(ARGS) tests/ops/test_plan_cpp.py \
	  tests/ops/test_gather_rows.py tests/ops/test_combine_rows.py \
	  tests/ops/test_expert_mlp_cpp.py tests/ops/test_expert_linear_cpp.py tests/ops/test_route_cpp.py \
	  tests/ops/test_attention_cpp.py tests/ops/test_amx.py
	CI=true $(PYTEST) -n $(WORKERS) $(ARGS) $(CUDA_ON_CPU)

# FUZZ_SEED=... repeats a run.
FUZZ_SECONDS ?= 600
fuzz: setup
	$(PY) -P -m tests.ops.fuzz --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

# RESULT: where a run is written to; ARGS: such as `--seconds 1`, or names of operations.
RESULT ?= bench/results/local/bench.json
LOCAL := bench/results/local
JOBS := embedding natural_step cached_step
bench: setup
	$(PY) -m bench --json $(RESULT) $(ARGS)
	$(PY) -m bench $(JOBS) --processes 1 --json $(LOCAL)/jobs.json $(ARGS)
	$(PY) -m bench.report --results $(LOCAL) --output $(LOCAL)/benchmarks.md

# The tables of the docs, in their full sizes: hours.
bench-full: setup
	$(PY) -m bench --size full --json $(RESULT) $(ARGS)
	$(PY) -m bench $(JOBS) import_time --size full --json $(LOCAL)/jobs.json $(ARGS)
	$(PY) -m bench.report --results $(LOCAL) --output $(LOCAL)/benchmarks.md

# GPU_OUT: the folder of all output.
GPU_OUT ?= bench/results/local/gpu
bench-gpu: setup
	$(PY) -m bench.gpu --out $(GPU_OUT) $(ARGS)

# Exit code 1: a case became slower. AGAINST: the committed run to hold RESULT against; by default the
# newest of this processor's maker. Names with a maker are parts of a run; AMD's whole one has none.
INTEL := $(sort $(wildcard bench/results/cpu-intel-*.json))
AMD := $(sort $(wildcard bench/results/cpu-2*.json))
AGAINST ?= $(lastword $(if $(shell grep -m 1 -s GenuineIntel /proc/cpuinfo),$(INTEL),$(AMD)))
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
	$(VENV)/bin/lint-imports --no-cache
	$(MAKE) --no-print-directory lint-schemas

SCHEMA := $(VENV)/bin/check-jsonschema --builtin-schema
FORMS := .github/ISSUE_TEMPLATE
lint-schemas: setup
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-config $(FORMS)/config.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard $(FORMS)/*.yml))
	$(SCHEMA) vendor.citation-file-format CITATION.cff

# The site is built in an environment of its own, without torch: docstrings are read, not imported.
DOCS_ENV := $(VENV)-docs
$(DOCS_ENV)/.ready: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS_ENV)/requirements.txt
	$(DOCS_ENV)/bin/python -m pip install --disable-pip-version-check $(addprefix -c ,$(LOCK)) \
	  -r $(DOCS_ENV)/requirements.txt
	@touch $@

docs: $(DOCS_ENV)/.ready
	rm -rf build/docs
	mkdir -p build/docs/experiments
	cp -R $(wildcard *.md) docs examples build/docs
	cp -R experiments/results build/docs/experiments
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict
	@echo "The site is in build/site."

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info moe_fast/_native*.so
	rm -rf .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
