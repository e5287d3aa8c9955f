# make run        execute the notebook into a copy with outputs (PRESET=standard for another preset than `quick`)
# make test       lint, unit tests, and the notebook at the preset `smoke`
# make notebook   execute reproduction.ipynb in place at `quick`, for a commit
# make records    train the runs of a list and publish them in results/ (LIST=table1, narrow, controls, quick,
#                 paper, released, released_quick, released_short, collapse, collapse_long, collapse_more,
#                 collapse_wide, collapse_standard, tried, segmentation)
# make bench      measure speed, into results/benchmark.json
# make faults     kill trainings at random moments (KILLS=100, on JAX 3), and compare what they end with
# make colab      run the notebook with Colab's Python and package versions, alone in a folder
# make browser    run it in JupyterLab in a headless Chromium, and use its controls
#
# PYTHON=python3.13 takes another Python, in an environment of its own.

PYTHON ?= python3
PRESET ?= quick
LIST ?= table1
KILLS ?= 100
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
SHELL := /bin/bash
export REPRODUCTION_PRESET ?= $(PRESET)

# The images lie beside the project on the machines where it is developed; elsewhere Keras downloads them.
ifneq ($(wildcard ../shared/cifar10.npz),)
export CIFAR10_NPZ ?= $(abspath ../shared/cifar10.npz)
export ISBI2012_NPZ ?= $(abspath ../shared/isbi2012_em.npz)
endif

.PHONY: run test notebook records bench faults colab browser lint clean

run: $(VENV)/ready
	$(BIN)/python tests/notebook.py --output reproduction-$(PRESET).ipynb

# A list of runs that is under way stands still meanwhile.
test: $(VENV)/ready lint
	$(BIN)/python tests/records.py --pause
	trap '$(BIN)/python tests/records.py --resume' EXIT; $(BIN)/python -m pytest -q -n 2 --dist load --maxschedchunk 1 --durations=8

notebook: $(VENV)/ready
	$(BIN)/python tests/notebook.py

bench: $(VENV)/ready
	$(BIN)/python tests/records.py --pause
	trap '$(BIN)/python tests/records.py --resume' EXIT; $(BIN)/python tests/benchmark.py

faults: $(VENV)/ready
	KILLS=$(KILLS) $(BIN)/python -m pytest -q tests/test_runs.py -k killed
	KERAS_BACKEND=jax KILLS=3 $(BIN)/python -m pytest -q tests/test_runs.py -k killed

colab: $(VENV)/ready
	$(BIN)/python tests/colab.py
	$(BIN)/python tests/colab.py --jax

browser: $(VENV)/ready
	$(BIN)/python -m pip install --quiet selenium
	$(BIN)/python tests/browser.py

records: $(VENV)/ready
	$(BIN)/python tests/records.py $(LIST)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# elasticdeform is compiled here, which takes a C compiler and the Python headers.
$(VENV)/ready: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache __pycache__ tests/__pycache__
