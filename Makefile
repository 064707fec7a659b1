# `make` shows what there is. Every target builds .venv when it is missing or older than the pins.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test test-long lint bench prune clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.pins ## Build .venv from requirements.txt

$(VENV)/.pins: requirements.txt constraints.txt
	@echo "Building $(VENV) from requirements.txt (a minute or two)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

run: setup ## Run the pipeline end to end (the phantom cohort, unless params.yaml says otherwise), to scores and a report
	dvc repro
	@python -m stages.evaluate --show

test: setup ## Run the checks and the tests
	ruff check .
	ruff format --check .
	mypy
	python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not long"

test-long: setup ## Run the tests that take longest (DVC's experiments, kills and resumes), which make test leaves out
	python -m pytest --numprocesses auto --dist loadfile -m long

lint: setup ## Mend what ruff can mend, then check style and types
	ruff check --fix .
	ruff format .
	mypy

bench: setup ## Measure: each benchmark prints a card, and JSON in its last line (bench_scale: 6 GB of disk; all together 20 minutes; bench_train: by hand, on a GPU)
	for script in $(filter-out benchmarks/bench_train.py, $(wildcard benchmarks/bench_*.py)); do PYTHONPATH=. python $$script || exit 1; done

prune: setup ## Free the disk of unfinished work and cached outputs that nothing current uses
	python -m stages.prune
	dvc gc --workspace --force

clean: ## Remove .venv and everything that a run has made; what is committed stays
	rm -rf $(VENV) .dvc/cache .dvc/tmp dvc_plots predictions data/wip data/index data/preprocess data/store.zarr data/.store.zarr.* data/folds \
		data/train data/live/*/fold-* data/report/*.html data/report/*.csv data/report/*.parquet data/phantom/dicom data/phantom/labels.csv
