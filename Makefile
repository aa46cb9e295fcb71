# `make repro` learns and evaluates the example concept; `make test` runs the tests. Both install what they need.
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/bin/uv pip install --quiet --compile-bytecode --python
unexport PYTHONDONTWRITEBYTECODE  # compiled files halve the start of every stage
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

TEST_PROCESSES ?= 2
test test-all coverage: export OMP_NUM_THREADS := 1  # of each process; more would fight for the cores

.PHONY: help install repro app ui experiments test test-all coverage lint format lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(VENV)/installed .venv-clip-retrieval/installed ## create both environments from the lock files

repro: install ## run the stages of the pipeline that have changed
	customdiff check
	dvc repro
	@echo "report: results/evaluate/report.html    run: make ui    adapter: models/adapter"

ui: install ## browse the runs in MLflow
	@echo "open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
	mlflow ui --backend-store-uri sqlite:///mlflow.db --port 5000

app: install ## open a local page over the pipeline
	$(UV) $(VENV) --requirement requirements/app.txt
	customdiff app

# files, and figures that leave no room for two parameters in 120 columns
HIDDEN := Created|data|customdiff|stages|models|results|.*alignment|identity_delta|holdout_share|class_drift|prior_kid
experiments: install ## what experiments change and what comes of it
	dvc exp show --only-changed --drop '$(HIDDEN)'

test: install ## run the tests
	pytest -n $(TEST_PROCESSES)

test-all: install ## run all tests, including those that take minutes
	pytest -n $(TEST_PROCESSES) -m "slow or not slow"

coverage: install ## run the tests and report which lines they cover
	pytest -n $(TEST_PROCESSES) --cov --cov-report=term --cov-report=html
	@echo "report: htmlcov/index.html"

lint: install ## check style and types
	ruff check .
	ruff format --check .
	mypy

format: install ## fix style
	ruff check --fix .
	ruff format .

lock: $(VENV)/installed ## update the lock files
	uv pip compile $(LOCK) --extra pipeline --extra dev pyproject.toml -o requirements/lock.txt
	uv pip compile $(LOCK) --extra app --constraint requirements/lock.txt pyproject.toml -o requirements/app.txt
	uv pip compile $(LOCK) requirements/clip-retrieval.in -o requirements/clip-retrieval.txt
LOCK := --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links

clean: ## remove outputs; environments, DVC's cache and MLflow's store stay
	rm -rf .checkpoints .base-images .latents .input-hashes.json build data/inputs data/instances data/classes data/prepared data/former data/index models/adapter results/train results/evaluate

$(VENV)/installed: requirements/lock.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing PyTorch, diffusers, DVC and MLflow into $(VENV) (several GB, a few minutes)"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements/uv.txt
	$(UV) $(VENV) --requirement requirements/lock.txt
	$(UV) $(VENV) --no-deps --editable .
	@$(VENV)/bin/customdiff offline-plots || true
	@touch $@

# clip-retrieval needs older releases of numpy, pandas and transformers, so it has an environment of its own
.venv-clip-retrieval/installed: requirements/clip-retrieval.txt $(VENV)/installed
	$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python .venv-clip-retrieval
	$(UV) .venv-clip-retrieval --requirement requirements/clip-retrieval.txt
	@touch $@
