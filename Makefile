# One command each: `make help` lists them. Every target sets up its own environment in .venv first.
# PYTHON=python3.12 picks another interpreter for it.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help conformance smoke mutants vectors assimilate trial bench bench-scale scaling test lint tiny-data train-tiny clean

help: ## list these commands
	@printf 'usage: make COMMAND\n\n'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@printf '\nThe first command makes the environment in %s (Python 3.11 or newer).\n' '$(VENV)'

conformance: $(READY) ## judge the reference in every profile; ADAPTER=module:object judges your port
	@$(RUN) -m conformance run $(if $(ADAPTER),--adapter "$(ADAPTER)")

smoke: $(READY) ## one case of each operation, in seconds
	@$(RUN) -m conformance smoke $(if $(ADAPTER),--adapter "$(ADAPTER)")

mutants: $(READY) ## try the suite on all wrong ports and honest variants (minutes)
	@$(RUN) -m conformance mutants

vectors: $(READY) ## freeze the vectors in tiny_data/vectors/ again
	@$(RUN) -m conformance generate

assimilate: $(READY) ## assimilate observations into the tiny world and write the ensemble
	@$(RUN) -m storm_ref assimilate

trial: $(READY) ## score forecasts and analyses on held-back data; DATA=FILE.nc takes your own
	@$(RUN) -m storm_ref trial $(if $(DATA),--data "$(DATA)")

bench: $(READY) ## count and time linear cost, and what tiling costs in fidelity, on this machine (minutes)
	@$(RUN) -m storm_ref.experiments.bench

bench-scale: $(READY) ## histories of 20 billion tokens and the largest frames; stop and start it at will (an hour)
	@$(RUN) -m storm_ref.experiments.bench scale

scaling: $(READY) ## predict strong scaling from counted work and messages, and draw it
	@$(RUN) -m storm_ref.experiments.scaling

test: lint ## lint, then run all tests, on two processes; those that start ranks come last and alone
	@$(RUN) -m pytest -q -n 2 --dist worksteal -m 'not distributed'
	@$(RUN) -m pytest -q -m distributed

lint: $(READY) ## style (ruff), types (mypy, strict), and who may import what (import-linter)
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@$(RUN) -m mypy --no-error-summary
	@$(RUN) -c 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())' >build/imports.txt || { cat build/imports.txt; exit 1; }

tiny-data: $(READY) ## make the data files in tiny_data/ again
	@$(RUN) tiny_data/make_tiny_data.py

train-tiny: $(READY) ## train the network that tiny_data/ carries again
	@$(RUN) -m storm_ref train --frames 2 --patch 4 --width 80 --depth 3 --covariance-rank 64 \
	    --mixed-transitions 1 --learning-rate 2e-3 --train-steps 1500 --out tiny_data/storm_tiny.safetensors

clean: ## remove the environment and everything the tools cached
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Commands call `python -m NAME`: the scripts pip writes break where the path holds a space.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'storm-ref needs Python 3.11 or newer and "$(PYTHON)" is not: try make PYTHON=python3.11' >&2; exit 1; }
	@echo 'setting up $(VENV) (a few minutes the first time)'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
