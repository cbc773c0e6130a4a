# Everything that a newcomer, a developer or CI does with this tree. `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
SEEDS ?= 200
NODE ?= a
# Folders that exist by now.
CODE := nfsha tests $(wildcard scripts/*.py) $(if $(wildcard bench/*.py),bench)
TESTS := $(wildcard tests/unit tests/sim tests/netns tests/vm)

# A hard end: 35 minutes with set-up. ^C reaches pytest, which then takes down what its tests have built.
PYTEST := timeout --foreground --signal=INT --kill-after=20 2040 $(PYTHON) -m pytest --session-timeout=1980
# Two processes: whole pairs, which mostly wait, in one; all else beside them (tests/conftest.py).
BESIDE := -n 2 --dist each

.PHONY: help setup venv demo test test-all test-versions check format sim bench-failover bench-replication \
	bench-failback lab-up lab-shell lab-down lock docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing on a Debian 12 machine (root; done by itself before all that needs it)
	@scripts/setup.sh machine

venv:
	@scripts/setup.sh venv

demo: setup ## two storage servers in a box: kill one, watch the other take over, and go home again (root; 90 s)
	@$(PYTHON) -m tests.netns.demo

test: setup ## all tests but the slow ones (root; some 20 minutes, at most 35)
	@$(PYTEST) $(BESIDE) -m "not slow" $(TESTS)

test-all: setup ## all tests, however long they take, properties on new examples each time (root)
	@$(PYTHON) -m pytest $(BESIDE) --hypothesis-profile=explore $(TESTS)

test-versions: setup ## unit tests and a short simulation on each other Python that is here
	@scripts/test-versions.sh

check: venv ## format, lint, types, import rules
	@.venv/bin/ruff format --check $(CODE)
	@.venv/bin/ruff check $(CODE)
	@.venv/bin/mypy $(CODE)
	@.venv/bin/lint-imports --no-logo

format: venv ## format the code and sort its imports
	@.venv/bin/ruff check --select I --fix --quiet $(CODE)
	@.venv/bin/ruff format $(CODE)

sim: venv ## simulate: make sim SEEDS=2000 (both cores)
	@$(PYTHON) -m tests.sim --seeds $(SEEDS)

bench-failover: setup ## outage and overlap, side by side with keepalived (root; long)
	@$(PYTHON) -m bench.failover

bench-replication: setup ## time, CPU, bytes and memory of copying, side by side with rsync from cron (root; long)
	@$(PYTHON) -m bench.replication

bench-failback: setup ## time without service on the way home, side by side with the manual runbook (root; long)
	@$(PYTHON) -m bench.failback

lab-up: setup ## build the lab and leave it up (root)
	@$(PYTHON) -m tests.netns.lab up

lab-shell: setup ## a shell on one of its machines: make lab-shell NODE=a
	@$(PYTHON) -m tests.netns.lab shell $(NODE)

lab-down: setup ## take the lab down
	@$(PYTHON) -m tests.netns.lab down

lock: venv ## make requirements/*.lock anew from pyproject.toml (UPGRADE=1: newer versions)
	@UPGRADE=$(UPGRADE) scripts/lock.sh

docs: venv ## write anew what is generated in docs/ and etc/
	@$(PYTHON) scripts/render_configuration.py
	@$(PYTHON) scripts/render_cli.py

clean: ## remove what checks, tests and set-up left in this tree (not the Debian packages)
	rm -rf .venv .venv-3.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage nfsha.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
