# The environment is made in .venv, once; it is brought up to date when pyproject.toml, setup.py or constraints.txt change.
PYTHON ?= python3
ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed
# DeepSpeed starts `python` and `ninja` by name, so the environment's own must come first.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
TRAIN := launch/train.py --ds_config ds_configs/zero3_mst.json
# A file's tests share what it builds once, so a file goes to one of the two processes.
PYTEST := python -m pytest -q -n 2 --dist loadfile --ignore=tests/slurm
# Accelerators, and the CPU threads for each of 2 ranks. torch counts the cores that this process may use.
COUNT_DEVICES := import torch; print(torch.accelerator.device_count(), max(1, torch.get_num_threads() // 2))

.PHONY: help train test test-slow test-slurm bench lint format clean

help:  ## Lists these commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  ARGS="..." goes on to train, test, test-slow, test-slurm and bench: make train ARGS="--output_dir /tmp/run --max_steps 20"'

train: $(INSTALLED)  ## Trains a model: on all accelerators, or with 2 ranks on the CPU where there is none.
	@found=$$($(VENV)/bin/python -c '$(COUNT_DEVICES)') || exit 1; \
	set -- $$found; accelerators=$$1; threads=$${OMP_NUM_THREADS:-$$2}; \
	if [ "$$accelerators" -gt 0 ]; then \
	  echo "==> Training on $$accelerators accelerator(s): deepspeed $(TRAIN)" $(ARGS); \
	  $(IN_VENV) deepspeed $(TRAIN) $(ARGS); \
	else \
	  echo "==> No accelerator found. Training on the CPU with 2 ranks of $$threads thread(s) each."; \
	  echo "    DeepSpeed compiles its shared-memory collective when it is first used (about 40 s)."; \
	  echo "==> deepspeed --num_gpus 2 $(TRAIN)" $(ARGS); \
	  $(IN_VENV) OMP_NUM_THREADS=$$threads deepspeed --num_gpus 2 $(TRAIN) $(ARGS); \
	fi

test: $(INSTALLED)  ## Runs the tests of a change: every kind of behaviour, in about 10 minutes on 2 cores.
	@echo "==> Running the tests. The first run also compiles DeepSpeed's shared-memory collective (about 40 s)."
	@echo "    Not among them: the longer ones (make test-slow) and those of the jobs for SLURM (make test-slurm)."
	@$(IN_VENV) OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED)  ## Runs the longer tests: launched runs, kills, grids that repeat a proof.
	@$(IN_VENV) OMP_NUM_THREADS=1 $(PYTEST) -m slow $(ARGS)

test-slurm: $(INSTALLED)  ## Runs the tests of slurm/, on a cluster that they start on this machine.
	@command -v sbatch >/dev/null && command -v munge >/dev/null || \
	  { echo "error: no SLURM here. On Debian or Ubuntu: apt-get install --no-install-recommends slurm-wlm munge"; exit 1; }
	@$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -q tests/slurm $(ARGS)

bench: $(INSTALLED)  ## Times a training step against what else there is, and writes docs/benchmarks.md.
	@$(IN_VENV) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m benchmarks.step $(ARGS)
	@$(IN_VENV) python -m benchmarks.write_report

lint: $(INSTALLED)  ## Checks style, format and types, and changes nothing.
	@$(IN_VENV) ruff check
	@$(IN_VENV) ruff format --check
	@$(IN_VENV) mypy

format: $(INSTALLED)  ## Formats the code and mends what ruff can mend.
	@$(IN_VENV) ruff check --fix
	@$(IN_VENV) ruff format

clean:  ## Removes caches and build output. To start over, remove .venv too.
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an install that was broken off is taken up again by the next command.
# PyTorch comes before the rest, so that an already installed or locally provided build is kept.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) must be Python 3.10 or newer; choose another with: make PYTHON=python3.11"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "error: no C++ compiler ($${CXX:-c++}), which DeepSpeed needs. On Debian or Ubuntu: apt-get install g++"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "error: no Python.h, which DeepSpeed needs. On Debian or Ubuntu: apt-get install python3-dev"; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { echo "==> Creating the environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "==> Installing PyTorch (once; minutes, depending on the network)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@echo "==> Installing mst_ds and everything else it needs"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[tests,plots,peft]'
	@touch $@
	@echo "==> The environment is ready"
