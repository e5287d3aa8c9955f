# make run        execute the notebook at the preset `quick` (PRESET=... for another) into a copy with outputs
# make test       lint, unit tests, and the notebook at the preset `smoke`
# make notebook   execute reproduction.ipynb in place and renew its first screen, for a commit
# make bench      what a training step costs beside a plain loop, on this machine
# make records    train the runs of a list and publish them in results/ (LIST=collapse)
# make colab      execute the notebook alone in an environment like Colab's, at `smoke`

PYTHON ?= python3
PRESET ?= quick
BIN := .venv/bin
SHELL := /bin/bash

# CIFAR-10 lies beside the project on the machines where it is developed; elsewhere Keras downloads it.
SHARED_DATA := $(abspath $(wildcard ../shared/cifar10.npz))
ifneq ($(SHARED_DATA),)
export CIFAR10_NPZ ?= $(SHARED_DATA)
endif

.PHONY: run test notebook bench records colab lint clean

run: .venv/ready
	REPRODUCTION_PRESET=$(PRESET) $(BIN)/python tests/notebook.py --output reproduction-$(PRESET).ipynb

test: .venv/ready lint
	$(BIN)/python -m pytest -q --durations=8

notebook: .venv/ready
	$(BIN)/python tests/notebook.py

bench: .venv/ready
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python tests/benchmark.py

records: .venv/ready
	$(BIN)/python tests/records.py $(LIST)

colab: .venv/ready
	$(BIN)/python tests/colab.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# elasticdeform is compiled here, which takes a C compiler and the Python headers.
.venv/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__
