# Each target does all that it needs; a second run repeats nothing. `make help` lists them.

PYTHON ?= python3
# Where pip finds a smaller torch, if not in its own index: for example
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# A test that hangs fails, with the place where it does.
PYTEST_FLAGS ?= -n 2 --dist worksteal --timeout 900

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.setup-done
NATIVE := $(VENV)/.native-done
DOCS_SETUP := $(VENV)/.docs-done
WITHOUT := build/without-native
FAST_TESTS := $(addprefix tests/kernels/test_,backends.py operators.py straight_through.py columns.py) \
	$(addprefix tests/coreai_opt/quantization/,spec/test_fake_quantize.py spec/test_fast_path.py spec/test_spec.py) \
	$(addprefix tests/coreai_opt/quantization/test_,config.py containers.py errors.py modes.py placement.py weights.py) \
	$(addprefix tests/coreai_opt/,test_import.py pruning/test_prune_simulator.py palettization/test_fake_palettize.py)
ORACLE := .oracle/.coreai-opt-0.4.0
FORMATTED := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* tests/kernels/emulation/*.h tests/kernels/emulation/*.cpp)
SOURCES := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) kernels/coreai_kernels/formats.py

# The pinned versions hold for everything that pip installs below, build tools included.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: help demo test test-fast test-without-native lint docs bench build doctor gpu-check mps-check neon-check neon-tests clean distclean fuzz count \
	sanitize wheels matrix print-fast-tests
.DELETE_ON_ERROR:

help:
	@echo 'make demo       compressed training on real data: tables and demo/report.png'
	@echo 'make test       all tests          PYTEST_FLAGS="-k name" selects'
	@echo 'make test-fast  the part of them for every few minutes'
	@echo 'make test-without-native   the tests that an installation without a compiler has to pass'
	@echo 'make lint       ruff, mypy and clang-format'
	@echo 'make docs       the documentation as a site, in build/site; a broken link is an error'
	@echo 'make bench      micro-benchmarks   BENCH_FLAGS="--help" lists the options'
	@echo 'make count      instructions of kernels and calls, against committed figures; needs valgrind'
	@echo 'make sanitize   native code under sanitizers and valgrind: takes long'
	@echo 'make fuzz       random calls and sequences of actions against the reference and Apple; FUZZ=100 for hours'
	@echo 'make gpu-check  with the active Python, on a machine with a GPU: build, GPU tests, benchmarks'
	@echo 'make mps-check  on a Mac: every operator, and training, on its GPU'
	@echo 'make neon-check kernels for Arm, cross-compiled and emulated, beside generic ones: the same bits'
	@echo 'make neon-tests tests with an emulated aarch64 Python and torch   PYTEST_FLAGS=FILES selects'
	@echo 'make wheels     wheels for x86-64 and aarch64 Linux, or for this Mac, into dist; installed and tried out'
	@echo 'make matrix     fast tests of the wheels beside every torch and Python that can be had; 20 GB of downloads'
	@echo 'make build      set up .venv and build the native extension in place'
	@echo 'make doctor     what is installed and which backends run'
	@echo 'make clean      remove build products (distclean: the environments, too)'

# Two workers of two threads on two cores: OpenMP's threads would wait for each other by spinning, which is half of
# the processor time.
test test-fast test-without-native fuzz: export OMP_WAIT_POLICY := passive

demo: $(NATIVE)
	$(BIN)/python examples/digits_qat.py $(DEMO_FLAGS)
	$(BIN)/python examples/controllers/composed.py
	$(BIN)/python examples/digits_files.py

test: $(NATIVE) $(ORACLE)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

# What most changes break, in little more than a minute.
test-fast: $(NATIVE)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'not slow' $(FAST_TESTS)

# A wheel built without a compiler, installed into a folder of its own, and fast tests beside it: on the reference, then
# fake quantizers on Triton's interpreter.
test-without-native: $(SETUP)
	rm -rf $(WITHOUT)
	mkdir -p $(WITHOUT)/source
	git archive HEAD | tar -x -C $(WITHOUT)/source
	CXX=/nonexistent $(PIP) wheel -q --no-deps --no-build-isolation -w $(WITHOUT) $(WITHOUT)/source/kernels $(WITHOUT)/source
	$(PIP) install -q --no-deps --target $(WITHOUT)/site $(WITHOUT)/*.whl
	cp -r tests pyproject.toml $(WITHOUT)/site
	cd $(WITHOUT)/site && COREAI_TEST_WITHOUT_NATIVE=1 $(CURDIR)/$(BIN)/python -m pytest $(PYTEST_FLAGS) \
		-m 'not slow' $(filter tests/coreai_opt/%,$(FAST_TESTS))
	cd $(WITHOUT)/site && COREAI_TEST_WITHOUT_NATIVE=1 TRITON_INTERPRET=1 COREAI_KERNELS_BACKEND=triton \
		$(CURDIR)/$(BIN)/python -m pytest $(PYTEST_FLAGS) -k 'not compile' \
		tests/coreai_opt/quantization/spec/test_fake_quantize.py tests/coreai_opt/quantization/test_modes.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

# Figures, notebooks and claims are made from sources of their own; what differs from what is committed shows in git.
docs: $(NATIVE) $(DOCS_SETUP)
	$(BIN)/python docs/figures/draw.py
	$(BIN)/python docs/site/notebooks.py
	$(BIN)/python -m benchmarks.claims
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_SETUP): $(SETUP)
	$(PIP) install -q $$($(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

bench: $(NATIVE)
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

# A guard against slowing down that needs no clock. Debian: apt install valgrind
count: $(NATIVE)
	@$(BIN)/python -m benchmarks.instructions $(COUNT_FLAGS)

# AddressSanitizer, UBSan, ThreadSanitizer, valgrind. Debian: apt install g++ valgrind libomp-14-dev
sanitize: $(SETUP)
	PYTHON=$(CURDIR)/$(BIN)/python .ci/sanitize

# Random calls of kernels and sequences of actions, other ones each time; FUZZ=20 takes twenty times as long.
FUZZ ?= 10
fuzz: $(NATIVE) $(ORACLE)
	FUZZ_EXAMPLES=$$((200 * $(FUZZ))) FUZZ_CALLS=$$((2000 * $(FUZZ))) FUZZ_START=$$(date +%s) \
		$(BIN)/python -m pytest $(PYTEST_FLAGS) --timeout 0 tests/fuzz tests/parity/test_sequences.py tests/kernels/test_backends_agree.py

build: $(NATIVE)

doctor: $(NATIVE)
	$(BIN)/python -m coreai_opt.doctor

# Not in .venv: the torch that knows the GPU is the one of the machine.
gpu-check: export PIP_CONSTRAINT :=
gpu-check:
	COREAI_BUILD_NATIVE=require $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_FLAGS)

# On a Mac's GPU, which gets the reference: it has to give what the CPU does.
mps-check: $(NATIVE)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.backends.mps.is_available())' || \
		{ echo 'torch sees no Metal GPU here. This is for a Mac; on other machines make test checks that'; \
		echo 'the reference uses only what torch has for Metal.'; exit 1; }
	PYTORCH_ENABLE_MPS_FALLBACK=0 $(BIN)/python -m pytest -ra tests/kernels/test_mps_device.py \
		tests/kernels/test_mps.py tests/coreai_opt/test_mps.py

# NEON's kernels against the generic ones of this machine, which the tests compare with the reference.
# Debian: apt install g++-aarch64-linux-gnu qemu-user
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
NEON := build/neon-check
NEON_CASES ?= 300
CHECKED := $(addprefix csrc/cpu/,kernels dispatch geometry bits kernels_generic)
CHECK_FLAGS := -std=c++20 -O2 -ffp-contract=off -fno-math-errno -Wno-psabi -Icsrc -I$(NEON)
neon-check:
	mkdir -p $(NEON)/common
	$(PYTHON) -c "import runpy; print(runpy.run_path('kernels/coreai_kernels/formats.py')['native_header']())" \
		> $(NEON)/common/formats.h
	$(CXX) $(CHECK_FLAGS) tests/kernels/instruction_sets.cpp $(CHECKED:=.cpp) -o $(NEON)/here
	$(ARM_CXX) $(CHECK_FLAGS) -DCOREAI_HAVE_NEON tests/kernels/instruction_sets.cpp $(CHECKED:=.cpp) \
		csrc/cpu/kernels_neon.cpp -o $(NEON)/arm
	$(NEON)/here generic $(NEON_CASES) > $(NEON)/here.txt
	$(ARM_RUN) $(NEON)/arm neon $(NEON_CASES) > $(NEON)/neon.txt
	cmp $(NEON)/here.txt $(NEON)/neon.txt
	@echo "$$(wc -l < $(NEON)/neon.txt) results of NEON are those of the generic kernels"

# Files of tests beside the reference, on an emulated Arm machine. Minutes a file.
neon-tests: PYTEST_FLAGS = tests/kernels/test_columns.py
neon-tests: $(SETUP)
	PYTHON=$(CURDIR)/$(BIN)/python tests/kernels/arm_emulation $(PYTEST_FLAGS)

# Wheels of both distributions, and what a user does with one. Debian, for the second architecture:
# apt install g++-aarch64-linux-gnu
WHEEL_ARCHS ?= $(if $(filter Darwin,$(shell uname -s)),arm64,x86_64 aarch64)
wheels: $(SETUP)
	$(BIN)/python tools/wheels.py --arch $(WHEEL_ARCHS) $(WHEEL_FLAGS)
	$(BIN)/python tools/try_wheel.py $(TRY_FLAGS)

# MATRIX_FLAGS="--torch 2.15.0 --python 3.11" selects.
matrix: $(SETUP)
	$(BIN)/python tools/matrix.py $(MATRIX_FLAGS)

print-fast-tests:
	@echo $(FAST_TESTS)

# torch comes first and alone: with it in place no other requirement can pull in another build of it.
$(SETUP): pyproject.toml kernels/pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(PIP_FLAGS) torch setuptools wheel ninja
	COREAI_BUILD_NATIVE=skip COREAI_BUILD_ENGINE=version \
		$(PIP) install -q $(PIP_FLAGS) --no-build-isolation -e ./kernels -e '.[dev]'
	@touch $@

# Not by pip above, which builds in a new folder each time; here only what changed is compiled.
$(NATIVE): $(SETUP) kernels/setup.py $(SOURCES)
	COREAI_BUILD_NATIVE=require $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# Apple's package, which the parity tests compare with in processes of their own.
$(ORACLE): | $(SETUP)
	rm -rf .oracle
	$(PIP) install -q $(PIP_FLAGS) --no-deps --target .oracle coreai-opt==0.4.0
	$(PIP) install -q $(PIP_FLAGS) --no-deps --target .oracle-0.3.0 --upgrade coreai-opt==0.3.0
	@touch $@

clean:
	rm -rf build dist kernels/build *.egg-info kernels/*.egg-info .mypy_cache .pytest_cache .ruff_cache $(NATIVE)
	rm -f kernels/coreai_kernels/_build_report.json kernels/coreai_kernels/*.so
	find coreai_opt kernels tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) .oracle .oracle-0.3.0
