# make demo | test | bench | gpu | lint | clean
# Each sets up what it needs in .venv: the tools of requirements-dev.txt, then the package. A second
# call does only what changed: Python files are used where they lie, C++ files are built again.

# What creates .venv, and what `make gpu` runs on: Python >= 3.10.
PYTHON ?= python3
# More words for the command, as in: make test ARGS="-k gram"
ARGS ?=
# Where `make gpu` writes.
OUT ?= build/gpu/results
# Where `make bench` writes: a folder named after the CPU or the GPU.
RESULTS ?= bench/results/$(shell $(RUN) -c "from dashpot import _info; \
  print(_info.device_name(_info.default_device()))" | tr -cs '[:alnum:]\n' '-')

RUN := .venv/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check
FILES := find csrc python triton_kernels -type f -not -name '*.pyc'
PACKAGE := .venv/package-$(shell $(FILES) | sort | cksum | cut -d ' ' -f 1)
PYTEST := $(RUN) -m pytest -n 2 tests
# With ARGS one of the processes of `make test` may have nothing to do: pytest's exit status 5.
MAY_BE_NONE := $(if $(ARGS),|| test $$? = 5)

.PHONY: demo test bench gpu lint clean test-suite test-triton test-emulator
.NOTPARALLEL:

demo: $(PACKAGE)
	$(RUN) -m dashpot demo $(ARGS)

# All three also if one fails, and then a failure at the end.
test: $(PACKAGE)
	@$(MAKE) --no-print-directory --keep-going test-suite test-triton test-emulator

test-suite: $(PACKAGE)
	$(PYTEST) $(ARGS) $(MAY_BE_NONE)

# Triton's kernels in its interpreter.
test-triton: $(PACKAGE)
	TRITON_INTERPRET=1 $(PYTEST) -m triton $(ARGS) $(MAY_BE_NONE)

# The CUDA kernels on the CPU, in the emulator, under AddressSanitizer.
test-emulator: $(PACKAGE)
	settings=$$($(RUN) tests/emulator/build.py --sanitize) && eval "$$settings" && \
	$(PYTEST) -m emulator $(ARGS) $(MAY_BE_NONE)

bench: $(PACKAGE)
	mkdir -p "$(RESULTS)"
	$(RUN) -m pytest bench --benchmark-json="$(RESULTS)/bench.json" $(ARGS)
	$(RUN) -m bench.report "$(RESULTS)/bench.json" --table > "$(RESULTS)/README.md"
	$(RUN) -m bench.report "$(RESULTS)/bench.json" --plots "$(RESULTS)"

gpu:
	$(PYTHON) bench/gpu.py $(OUT) $(ARGS)

lint: .venv/tools
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	find csrc tests/emulator -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | \
	xargs .venv/bin/clang-format --dry-run -Werror

clean:
	rm -rf .venv build dist demo.png .pytest_cache .ruff_cache .hypothesis .benchmarks

# Stamps. torch comes in the same call as all other pins, so that nothing else chooses its version.
# The package's stamp is named after the list of its files: with one more or one less it is installed
# anew, since an editable install knows its modules by name.
.venv/tools: requirements-dev.txt requirements-peers.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-peers.txt
	touch $@

$(PACKAGE): .venv/tools pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	rm -f .venv/package-*
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@
