# The commands of this repository. `make demo` and `make test` work on a fresh Debian or Ubuntu machine.
SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: help setup lint test demo test-fresh soak setup-bench bench bench-quick bench-startup bench-warm clean

help:
	@echo 'make setup        system packages, .venv and the command .venv/bin/cachefs'
	@echo 'make demo         a real model from a real S3 server through the mount, cold and warm, every byte compared'
	@echo 'make test         set-up, checks and all tests (a .ci/run calls this)'
	@echo 'make lint         ruff, mypy --strict, import-linter'
	@echo 'make test-fresh   set-up and demo in a bare Debian (needs root and mmdebstrap)'
	@echo 'make soak         the long forms of the tests: hundreds of kills'
	@echo 'make bench        cold, start-up and warm against the peers (about an hour, needs root for the constrained link;'
	@echo '                  bench-quick: some minutes, no figures to keep)'
	@echo 'make bench-startup  first and second replica and a new node, against downloading before the start'
	@echo '                  (WITH_LLAMA=1: also with a real engine, llama.cpp, which is compiled first)'
	@echo 'make bench-warm   warm reads only'
	@echo 'make setup-bench  the peers of the benchmarks and what their links are made of (make bench... does it by itself)'
	@echo 'make test-image   the image as a root file system made by Debian tools, run under runc'
	@echo 'make test-csi     csi-sanity, grpcurl and the tests of driver and manifests, with the tools they need'
	@echo 'make setup-csi    the tools of test-csi'
	@echo 'make csi-stubs    csi/spec again from its protos'
	@echo 'make clean        removes what these commands made, .venv included'

setup:
	@scripts/setup.sh

lint: setup
	@scripts/lint.sh

test: lint
	@scripts/test.sh

demo: setup
	@$(PY) -m benchmarks.demo

test-fresh:
	@scripts/fresh.sh

soak: setup
	@scripts/test.sh --soak

setup-bench: setup
	@scripts/setup-bench.sh
	@$(PY) -m compileall -q cachefs csi  # as an installed package is: else each start of a process would compile

bench: setup-bench
	@$(PY) -m benchmarks.cold --rounds 5 --mib 512
	@$(PY) -m benchmarks.startup --rounds 5 --mib 2048
	@$(PY) -m benchmarks.warm --rounds 7 --mib 1024

bench-quick: setup-bench
	@$(PY) -m benchmarks.cold --rounds 1 --mib 64 --output .setup/bench
	@$(PY) -m benchmarks.startup --rounds 1 --mib 64 --output .setup/bench
	@$(PY) -m benchmarks.warm --rounds 1 --mib 64 --output .setup/bench

bench-startup: setup-bench
	@$(PY) -m benchmarks.startup --rounds 5 --mib 2048

bench-warm: setup-bench
	@$(PY) -m benchmarks.warm --rounds 7 --mib 1024

clean:
	rm -rf .venv .setup build dist *.egg-info bench-data .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f cachefs/_fuseshim*.so
	find cachefs tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

-include csi.mk
