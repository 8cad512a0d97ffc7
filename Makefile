# The two commands of a fresh machine:  make demo   and   make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Idle OpenMP threads sleep instead of spinning: on a machine with other work they cost more than they save.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test check proto clean
help:
	@echo "make demo                     set up, then the whole pipeline on generated data; report in out/report.html"
	@echo "make demo EVENTS=log.parquet ITEMS=items.parquet [USERS=users.parquet] [DATASET=description.yaml]"
	@echo "                              the same on your data (EVENTS may be a folder of Parquet parts)"
	@echo "make test                     set up, then lint, types and all tests"
	@echo "make proto                    regenerate online/generated from online/tower.proto"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time; later runs skip this)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

setup: $(READY)

demo: $(READY)
	@$(BIN)/python -m deploy.demo $(if $(EVENTS),--events '$(EVENTS)') $(if $(ITEMS),--items '$(ITEMS)') \
	  $(if $(USERS),--users '$(USERS)') $(if $(DATASET),--dataset '$(DATASET)') $(DEMO_FLAGS)

test: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -rs -n auto --maxprocesses 4 --dist loadfile

proto: $(READY)
	@$(BIN)/python -m grpc_tools.protoc --proto_path=online/generated=online --python_out=. --pyi_out=. \
	  --grpc_python_out=. online/generated/tower.proto

clean:
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
