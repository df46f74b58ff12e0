# `make quickstart` and `make test` are all a newcomer needs; both install what they use into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test gpu quality options format clean

help:
	@echo "make quickstart   pretrain a small LLaMA with Online Subspace Descent on this machine (2 minutes after the installation)"
	@echo "make test         run the tests (about 10 minutes on two cores)"
	@echo "make gpu          on a machine with a CUDA GPU: its tests and all benchmarks that want one (about 8 minutes)"
	@echo "make quality      formatting, lint and types"
	@echo "make options      after an option is added or changed: write what the code declares into signatures and docs/options.md"
	@echo "make format       let ruff rewrite the files"

install: $(VENV)/.installed

# Told before gigabytes are fetched: the python3 of Ubuntu 22.04 is older.
NEEDS := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
IS_OLD := import sys; sys.exit(sys.version_info < tuple(map(int, "$(NEEDS)".split("."))) and \
	"hf_osd needs Python $(NEEDS) or newer. Name one: make PYTHON=python$(NEEDS) $(MAKECMDGOALS)")

# An environment that has a torch before we come keeps it: it may be the only build that fits the machine's GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(PYTHON) -c '$(IS_OLD)' && $(PYTHON) -m venv $(VENV); }
	test ! -e $@ && $(BIN)/python -c "import torch" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	grep -v "^torch==" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	touch $@

# ARGS="--osd_source activations --output_dir runs/quickstart_activations": any further arguments.
quickstart: install
	$(BIN)/python examples/pretrain_llama.py --dataset docstrings --model llama_quickstart \
		--optim osd_adamw8bit --osd_rank 48 --osd_preset pretrain --learning_rate 5e-4 --max_steps 400 \
		--per_device_train_batch_size 4 --eval_steps 200 --logging_steps 20 --seed 1 --output_dir runs/quickstart $(ARGS)

# Every process of the tests works on tiny tensors: one thread each is fastest. Files stay together: some share fixtures
# that start processes of their own.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# ARGS="--only step_time_gpu": some parts. In an environment of your own: python examples/benchmarks/run.py gpu
gpu: install
	$(BIN)/python examples/benchmarks/run.py gpu $(ARGS)

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

options: install
	$(BIN)/python -m hf_osd.optim.options.texts

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
