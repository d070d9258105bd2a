# `make demo` and `make test` do everything from a fresh checkout; a second call reuses what is there.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --constraint requirements/constraints.txt
# a stamp a step, so that an interrupted set-up goes on where it stopped
DONE   := $(VENV)/done

.PHONY: setup demo test lint clean

setup: $(DONE)/project

demo: setup
	$(BIN)/mtpd demo --work-dir work/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DONE)/torch: requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel packaging ninja psutil
	mkdir -p $(DONE) && touch $@

# mmcv compiles its operators against this torch; pip keeps the wheel for the next time
$(DONE)/mmdet: $(DONE)/torch
	@echo "compiling mmcv's operators: about eight minutes on two cores, the first time"
	MAX_JOBS=$${MAX_JOBS:-$$(nproc)} $(PIP) --no-build-isolation onedl-mmcv
	$(PIP) --no-build-isolation onedl-mmdetection
	touch $@

# compat: a path entry, so that a folder named `cache` where a command is run does not hide the package `cache`;
# opencv-python, which mmcv asks for, needs a display's libraries; the headless build of the same version does not
$(DONE)/project: $(DONE)/mmdet pyproject.toml
	$(PIP) --no-build-isolation --config-settings editable_mode=compat --editable ".[dev]"
	$(BIN)/pip uninstall --quiet --yes opencv-python opencv-python-headless
	$(PIP) --no-deps opencv-python-headless
	touch $@

clean:
	rm -rf $(VENV)
