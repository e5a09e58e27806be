# `make demo` and `make test` each do everything on a fresh machine, set-up included.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: setup demo test soak check packages format clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/memformer train experiments/demo.yaml --folder $(DEMO)
	$(BIN)/memformer generate $(DEMO) --prompt "import os" --max_new_tokens 400 --temperature 0.7 --seed 1
	@echo
	@echo "Open $(DEMO)/summary.html. Then try:"
	@echo "  $(BIN)/memformer train experiments/text.yaml --data.train.path YOUR.txt    your own text"
	@echo "  $(BIN)/memformer train $(DEMO) --resume --training.num_updates 2000        go on with the demo"
	@echo "  $(BIN)/memformer train experiments/digits.yaml                            draw digits"
	@echo "  $(BIN)/memformer generate $(DEMO) --prompt_file FILE --save_session STATE  a memory to come back to"

test: setup
	$(BIN)/pytest -n 2
	$(BIN)/pytest -n 2 --override-ini addopts="--quiet --import-mode=importlib" tests/untyped

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Long campaigns: kills at random moments, documents of growing length, long streams, damaged files.
soak: setup
	$(BIN)/python -m tests.soak.kills --kills 200
	$(BIN)/python -m tests.soak.flat_memory
	$(BIN)/python -m tests.soak.long_horizon
	$(BIN)/python -m tests.soak.fuzz --cases 1000000

# The sdist and the wheel build, and the installed wheel works outside the tree.
packages: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python tests/smoke_installed_wheel.py dist

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv dist build
