# make run        execute the notebook at the preset `quick` in the recipe `reported` (PRESET=paper RECIPE=released for
#                 others) into a copy with outputs
# make test       lint, unit tests, and the notebook at the preset `smoke`
# make notebook   execute reproduction.ipynb in place and renew its first screen, for a commit
# make bench      what a training step costs beside a plain loop, on this machine
# make faults     break off a grid of runs at KILLS=100 random moments, and the other tests of faults
# make records    train the runs of a list and publish them in results/ (LIST=collapse)
# make browser    open the notebook in a headless Chromium, at `smoke`, and use its widgets (SHOTS=folder for screenshots)
# make colab      execute the notebook alone in an environment like Colab's, at `smoke`
#
# PYTHON=python3.13 takes another Python, in an environment of its own; CONSTRAINTS=tests/oldest.txt VENV=.venv-oldest
# the oldest packages that requirements.txt admits.

PYTHON ?= python3
PRESET ?= quick
RECIPE ?= reported
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
CONSTRAINTS ?=
KILLS ?= 100
SHOTS ?= runs/browser
BIN := $(VENV)/bin
SHELL := /bin/bash

# The data sets lie beside the project on the machines where it is developed; elsewhere they are downloaded.
SHARED_CIFAR10 := $(abspath $(wildcard ../shared/cifar10.npz))
ifneq ($(SHARED_CIFAR10),)
export CIFAR10_NPZ ?= $(SHARED_CIFAR10)
endif
SHARED_ISBI2012 := $(abspath $(wildcard ../shared/isbi2012_em.npz))
ifneq ($(SHARED_ISBI2012),)
export ISBI2012_NPZ ?= $(SHARED_ISBI2012)
endif

.PHONY: run test notebook bench faults records browser colab lint clean

run: $(VENV)/ready
	REPRODUCTION_PRESET=$(PRESET) REPRODUCTION_RECIPE=$(RECIPE) \
		$(BIN)/python tests/notebook.py --output reproduction-$(PRESET).ipynb

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=8

notebook: $(VENV)/ready
	$(BIN)/python tests/notebook.py

bench: $(VENV)/ready
	TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python tests/benchmark.py

faults: $(VENV)/ready
	KILLS=$(KILLS) $(BIN)/python -m pytest -q -s tests/test_faults.py

records: $(VENV)/ready
	$(BIN)/python tests/records.py $(LIST)

browser: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -r tests/browser.txt $(CONSTRAINTS:%=-c %)
	$(BIN)/python tests/browser.py $(SHOTS)

colab: $(VENV)/ready
	$(BIN)/python tests/colab.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# elasticdeform is compiled here, which takes a C compiler and the Python headers.
$(VENV)/ready: requirements.txt tests/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt $(CONSTRAINTS:%=-c %)
	touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache __pycache__ tests/__pycache__
