# One environment, .venv, for everything. `make demo` and `make test` set it up themselves.
PYTHON ?= python3
# The CPU build is small and quick to install; for a GPU: make setup TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# What is tested beside the newest transformers, which .venv has: the oldest that pyproject.toml allows.
OLDEST := .venv-oldest
# There, all of the models, and one search, share and transfer for their Trainer.
OLDEST_TESTS := python_tests/models $(addprefix python_tests/searching/, \
	test_run.py::test_a_search_finds_a_super_ticket_and_its_gain \
	test_sharing.py::test_each_arm_is_one_record_with_every_tasks_own_metric \
	test_transfer.py::test_both_ladders_are_climbed)
# Another one has what is optional: sentence-transformers, SetFit, Lightning and Ray.
EXTRAS := .venv-extras
# Tests run in this many processes, of one thread each outside python_tests/ops.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores : 8)))
PYTEST := -m pytest -q --numprocesses $(WORKERS) --dist loadgroup
# What runs once more with the encoders in CUDA graphs, which are emulated: python_tests/models/emulated_graphs.py.
GRAPH_TESTS := $(addprefix python_tests/models/test_, \
	$(addsuffix .py, apply boundary callback first_tokens importance kept_tickets patch rewind shared shrink))
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: setup demo test pytest test-triton test-isa test-long test-oldest test-extras lint bench sanitize gpu clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Three seeds of full fine-tuning, two winning levels and a random control: enough for a verdict, which on so few rows is
# most often that no difference is shown. Minutes on two cores.
demo: setup
	$(BIN)/ticketops search --output demo-run --sparsities 0.1,0.3 --kinds winning,random@0.1 --seeds 3 \
		--train-rows 800 --validation-rows 600

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both at once, since each of lint's tools has one process.
test: setup
	$(MAKE) --no-print-directory --jobs=2 lint pytest

pytest: setup
	$(BIN)/python $(PYTEST)
	TICKETOPS_TEST_GRAPHS=1 $(BIN)/python $(PYTEST) $(GRAPH_TESTS)

# Triton reads TRITON_INTERPRET when a kernel is decorated, so its interpreter has a test run of its own.
test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) -k triton python_tests/ops/test_triton.py python_tests/ops/test_guards.py

# Each instruction set that the processor has beside its best, of the kernels and of torch, whose results differ by
# roundings: as many runs of the tests of ops, but for the slow ones, and for the kernels' lowest those of models.
test-isa: setup
	@set -e; $(BIN)/python python_tests/instruction_sets.py | while read setting; do echo "$$setting"; \
		case "$$setting" in TICKETOPS_ISA=avx2) models=python_tests/models;; *) models=;; esac; \
		env $$setting $(BIN)/python $(PYTEST) -m "not long and not slow" python_tests/ops $$models < /dev/null; done

# Fuzzing, kills, random walks, exports of every encoder, whole builds and benchmarks. pytest ends with 5 where no test is marked so.
test-long: setup
	$(BIN)/python $(PYTEST) -m long $(TESTS) || test $$? -eq 5

# Environments that see .venv, and have more or other packages.
define BESIDE
	$(BIN)/python -m venv --clear $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(1)/bin/python -m pip install --quiet $(2)
	touch $@
endef

$(OLDEST)/.installed: $(VENV)/.installed
	$(call BESIDE,$(OLDEST),"transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml).*")

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST) $(OLDEST_TESTS)
	$(OLDEST)/bin/python $(PYTEST) -m long python_tests/models/test_everywhere.py

$(EXTRAS)/.installed: $(VENV)/.installed
	$(call BESIDE,$(EXTRAS),"sentence-transformers>=6" setfit lightning "ray>=2.60")

test-extras: $(EXTRAS)/.installed
	$(EXTRAS)/bin/python $(PYTEST) python_tests/test_examples.py \
		python_tests/models/test_sentence_transformers.py python_tests/searching/test_embedders.py
	$(EXTRAS)/bin/python -m pytest -q -m "long or not long" python_tests/searching/test_ray.py

bench: setup
	$(BIN)/python -m pytest bench

sanitize: setup
	csrc/sanitize.sh
	csrc/cuda/sanitize.sh

# Builds, tests and measures on the machine's own Python where that has torch and Triton, without the network; else in
# .venv. Where there is no GPU it goes the same way on tiny shapes, in Triton's interpreter. GPU_FLAGS, such as the name of
# one stage: python -m bench.gpu --help.
gpu:
	@if $(PYTHON) -c "import torch, triton, transformers" 2>/dev/null; then python=$(PYTHON); \
		for name in accelerate datasets hypothesis matplotlib pytest pytest_benchmark pytest_timeout setuptools; do \
			$$python -c "import $$name" || { echo "make gpu: $$python has torch but no $$name: install it, or give PYTHON=" >&2; exit 1; }; done; \
		$$python setup.py --quiet build_ext --inplace || exit 1; \
	else $(MAKE) setup && python=$(BIN)/python || exit 1; fi; \
	$$python -m bench.gpu $(GPU_FLAGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(EXTRAS) build dist *.egg-info ticketops/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
