# Kith's commands; `make help` lists them. Paths are relative throughout, so that a checkout whose
# path contains a space works. Nothing is installed twice: a stamp in .venv carries the checksum of
# what was installed (the lock file, setup.py, the place of the checkout) and is written last.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run-local test torture lint bench bench-embed bench-join clean venv lock

# A path or name of Python 3.11 or 3.12; found among the installed ones when not given.
PYTHON ?=
# More arguments for the command that run-local, test or bench runs.
ARGS ?=
# More options for `uv pip compile`, such as --upgrade.
LOCK_OPTIONS ?=

RUN := .venv/bin/python
PIP := PIP_USER=0 $(RUN) -m pip --disable-pip-version-check

checksum = $(shell { pwd; cat $(1); } | cksum | cut -d ' ' -f 1)
ENVIRONMENT := .venv/.environment-$(call checksum,requirements.lock)
KITH := .venv/.kith-$(call checksum,requirements.lock setup.py)
DEVELOPMENT := .venv/.development-$(call checksum,requirements.lock requirements-dev.lock)

help: ## Say what each command does
	@echo "make COMMAND, where COMMAND is one of"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14
	@echo "A Python of your choice: make run-local PYTHON=/path/to/python3.11 (after make clean)"

run-local: $(KITH) ## Set up if needed, then run the whole nightly path on the sample catalogue
	.venv/bin/kith nightly --config configs/local.yaml $(ARGS)

# A module's tests share what its fixtures made, so each module stays in one process; the long ones
# come first. `make test ARGS="-n 0"` uses one process.
test: $(KITH) $(DEVELOPMENT) ## Set up if needed, then run every test, on as many processes as cores (4 at most)
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

torture: $(KITH) $(DEVELOPMENT) ## Kill and fuzz for longer than a test may take (KITH_KILLS, KITH_FUZZ_EXAMPLES, KITH_BOUND_REPETITIONS, KITH_SEED)
	$(RUN) -m pytest tests/torture --timeout 0 $(ARGS)

lint: $(KITH) $(DEVELOPMENT) ## Check style, types and the direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy index_builder transforms pipelines
	.venv/bin/lint-imports

bench: $(KITH) ## Time the stages on the sample beside the bare limits of this machine
	$(RUN) -m benchmarks.stages $(ARGS)

bench-embed: $(KITH) $(DEVELOPMENT) ## Time embedding beside the limits of this machine and beside peers
	$(RUN) -m benchmarks.embed $(ARGS)

bench-join: $(KITH) $(DEVELOPMENT) ## Time the join beside the limit of the arithmetic and beside peers
	$(RUN) -m benchmarks.join $(ARGS)

venv: $(KITH) $(DEVELOPMENT) ## Only set up: .venv with Kith, the tests' and the linters' tools

clean: ## Remove the environment, the caches, the builds and the workspace of local runs
	rm -rf .venv workspace build dist kith_index.egg-info
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

COMPILE = .venv/bin/uv pip compile setup.py --quiet --custom-compile-command "make lock" \
	--python-platform x86_64-manylinux_2_28 $(LOCK_OPTIONS)

lock: $(DEVELOPMENT) ## Write both lock files again from setup.py (LOCK_OPTIONS=--upgrade for newer pins)
	$(COMPILE) --python-version 3.11 --output-file requirements.lock
	$(COMPILE) --python-version 3.11 --output-file requirements-dev.lock \
		--extra dev --constraint requirements.lock
	@echo "The pins of Python 3.11 must be all that Python 3.12 needs; more would be named here:"
	@$(COMPILE) --python-version 3.12 --output-file .venv/lock-3.12 \
		--extra dev --constraint requirements-dev.lock --no-annotate --no-header
	@! grep -vxF -f requirements-dev.lock .venv/lock-3.12

# An environment for other pins, or of a checkout that was moved, is made afresh.
$(ENVIRONMENT):
	@python="$$(PYTHON='$(PYTHON)' .ci/find-python)" || exit 1; \
	echo "Making .venv with $$python"; \
	rm -rf .venv && "$$python" -m venv .venv
	@echo "Installing the pinned packages of requirements.lock (about 1 GB, some minutes)"
	$(PIP) install --no-deps --requirement requirements.lock
	@touch $@

$(KITH): $(ENVIRONMENT)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(DEVELOPMENT): $(ENVIRONMENT)
	$(PIP) install --no-deps --requirement requirements-dev.lock
	@touch $@
