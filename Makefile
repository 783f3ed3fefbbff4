# make run    set up everything and show the paper's finding (panel=demo)
# make test   set up everything and run the tests
# make slurm  start a throw-away Slurm here and run its tests (packages slurm-wlm, munge), then stop it
# make check  lint and types

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: run test slurm check setup

run: setup
	$(BIN)/python run.py panel=demo

test: setup
	$(BIN)/python -m pytest

slurm: setup
	scripts/slurm_start.sh
	. "$${SLURM_LAB:-/tmp/mikv-slurm}/env.sh" && MIKV_REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm --durations=0; \
	  status=$$?; scripts/slurm_stop.sh; exit $$status

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/setup.sh
	touch $@
