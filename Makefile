# make demo: the whole chain on this machine's CPU.   make test: the suite.   make setup: only install.
PYTHON ?= python3
BIN := .venv/bin
RECIPE ?= deployments/recipes/demo_sft.yaml

.PHONY: setup demo demo-all up test test-all bench-checkpoints bench-data bench-train lint clean
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megatron-flows needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/mflow up --check
	@touch $@

demo: setup
	@$(BIN)/mflow run full-sft $(RECIPE)

# Pretraining, fine-tuning and preference training of the demo's model, one after the other.
demo-all: setup
	@$(BIN)/mflow run full-pretrain deployments/recipes/demo_pretrain.yaml
	@$(BIN)/mflow run full-sft deployments/recipes/demo_sft.yaml
	@$(BIN)/mflow run full-dpo deployments/recipes/demo_dpo.yaml

up: setup
	$(BIN)/mflow up

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not npu" $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest -m "not gpu and not npu" $(PYTEST_ARGS)

# Speed and memory of convert and export beside cp; 10 minutes and 32 GB of disk. BENCH_ARGS='--without-7b' for 12 GB.
bench-checkpoints: setup
	$(BIN)/python tests/benchmarks/bench_checkpoints.py $(BENCH_ARGS)

# Tokenizing beside its engine, tokenizers and datatrove, 10 minutes. BENCH_ARGS='--rounds 1 --large 0' for a quick look.
bench-data: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/benchmarks/bench_data.py $(BENCH_ARGS)

# Speed of the training loop beside a plain transformers loop, some minutes. MFLOW_REAL_DATA=FOLDER for chats, too.
bench-train: setup
	$(BIN)/python tests/benchmarks/bench_train.py $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf artifacts build *.egg-info .pytest_cache .ruff_cache
