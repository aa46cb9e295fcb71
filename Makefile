# Everything from a fresh clone: `make repro` learns and grades the example concept, `make test` proves the code.
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv pip install --quiet --compile-bytecode --python
unexport PYTHONDONTWRITEBYTECODE  # compiled files halve the start of every stage
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help install repro ui test test-all lint format lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/installed .venv-clip-retrieval/installed ## make both environments from the locks

repro: install ## run the pipeline: what params.yaml says, and only what has changed
	dvc repro
	@echo "report: results/evaluate/report.html    run: make ui    adapter: models/adapter"

ui: install ## browse the runs in MLflow
	@echo "open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
	mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5000

test: install ## run the tests
	pytest

test-all: install ## run the tests, those of minutes included
	pytest -m "slow or not slow"

lint: install ## check style
	ruff check .
	ruff format --check .

format: install ## mend style
	ruff check --fix .
	ruff format .

lock: $(VENV)/installed ## resolve the locks anew
	uv pip compile $(LOCK) --extra pipeline --extra dev pyproject.toml -o requirements/lock.txt
	uv pip compile $(LOCK) requirements/clip-retrieval.in -o requirements/clip-retrieval.txt
LOCK := --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links

clean: ## remove what runs have made; environments, DVC's cache and MLflow's store stay
	rm -rf .checkpoints .base-images .input-hashes.json build data/inputs data/instances data/classes data/prepared data/index models results/train results/evaluate

$(VENV)/installed: requirements/lock.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing PyTorch, diffusers, DVC and MLflow into $(VENV) (several GB, a few minutes)"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/uv.txt
	$(UV) $(VENV) --requirement requirements/lock.txt
	$(UV) $(VENV) --no-deps --editable .
	@touch $@

# clip-retrieval holds numpy, pandas and transformers back, so it has an environment of its own
.venv-clip-retrieval/installed: requirements/clip-retrieval.txt $(VENV)/installed
	$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python .venv-clip-retrieval
	$(UV) .venv-clip-retrieval --requirement requirements/clip-retrieval.txt
	@touch $@
