# Plain `make` prints help. Every target sets up what it needs in .venv, once, and again when
# pyproject.toml changes. PYTHON=/path/to/python3.11 names the interpreter to build it with.

.DEFAULT_GOAL := help
.PHONY: help broker demo demo-kafka test test-all check format compile bench clean again
.NOTPARALLEL:

python := .venv/bin/python
pytest := $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15
# The stamps carry the checkout's place, since an editable install points there.
place := $(shell pwd | cksum | cut -d' ' -f1)
for_demo := .venv/.ready-demo-$(place)
for_dev := .venv/.ready-dev-$(place)

help:
	@echo "make demo      train a small GPT, injure it, watch Argus save it (90 s)"
	@echo "make demo-kafka  the same as a fleet: Kafka, a worker, a job of two ranks (2 minutes)"
	@echo "make broker    a Kafka on this machine, until Ctrl-C (Java 17 and Maven)"
	@echo "make test      the tests but the slow ones (under 15 minutes)"
	@echo "make test-all  all tests"
	@echo "make check     format, lint, types, import contracts, then make test: what CI runs"
	@echo "make format    let ruff format, sort imports and fix what it can"
	@echo "make compile   the fold in machine code, four times as fast, in build/compiled (a minute)"
	@echo "make bench     every figure of the README: tables here, JSON beside them (an hour)"
	@echo "make clean     remove .venv, caches and builds"

demo: $(for_demo)
	.venv/bin/argus demo

demo-kafka: $(for_dev)
	$(python) examples/fleet/demo.py

broker:
	@found=$$(PYTHON="$(PYTHON)" sh deploy/find-python.sh) && exec "$$found" deploy/local-broker/local_broker.py

test: $(for_dev)
	$(pytest) -m "not slow"

test-all: $(for_dev)
	$(pytest)

check: $(for_dev)
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy
	$(python) -m basedpyright
	$(python) -c 'from importlinter.cli import lint_imports_command as run; run()'
	$(MAKE) test

format: $(for_dev)
	$(python) -m ruff format
	$(python) -m ruff check --fix

compile: $(for_dev)
	$(python) deploy/compile_fold.py

bench: $(for_dev)
	$(python) benchmarks/overhead.py
	$(python) benchmarks/throughput.py
	$(python) benchmarks/replay_speed.py
	$(python) benchmarks/throughput.py --kafka
	$(python) benchmarks/latency.py
	$(python) benchmarks/store.py
	$(python) benchmarks/checkpoints.py
	$(python) benchmarks/signals.py
	$(python) benchmarks/local_faults.py
	$(python) benchmarks/forensics.py
	$(python) benchmarks/adqi.py
	$(python) benchmarks/first_cause.py --seeds 8

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv whose Python is gone (moved, or its interpreter removed) is made again.
$(for_demo) $(for_dev): .venv/.ready-%-$(place): pyproject.toml deploy/setup_env.py \
		$(if $(wildcard $(python)),,again)
	@found=$$(PYTHON="$(PYTHON)" sh deploy/find-python.sh) && "$$found" deploy/setup_env.py $*
	@touch $@
