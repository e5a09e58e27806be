# `make demo` and `make test` work on a fresh machine: they set up the environment first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/fact
TEXT_DEMO := runs/demo

.PHONY: setup demo demo-text docs test test-oldest cuda soak check packages format clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,eval]'
	$(COMPILE_PACKAGES)
	touch $@

# Compiles the installed packages on all cores; pip would use one. Tests and most models of transformers are left out
# because this project does not import them. Files that are not valid Python 3 are skipped, as pip does.
UNUSED = /tests/|/transformers/models/(?!auto/|__init__)
COMPILE_PACKAGES = $(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' .venv/lib || true

# Trains a model that recalls one fact after 10,000 segments; takes about two minutes on a CPU.
demo: setup
	$(BIN)/memformer train experiments/retention/fact.yaml --folder $(DEMO)
	$(BIN)/memformer retention $(DEMO) --distances 1 32 100 1000 10000
	@echo
	@echo "Open $(DEMO)/retention.png and $(DEMO)/summary.html. Then try:"
	@echo "  make demo-text                                                          a language model of Python source"
	@echo "  $(BIN)/memformer train experiments/text.yaml --data.train.path YOUR.txt    your own text"
	@echo "  $(BIN)/memformer train experiments/digits.yaml                            draw digits"

# Trains a small language model on the Python standard library; takes three to eight minutes on a CPU.
demo-text: setup
	$(BIN)/memformer train experiments/demo.yaml --folder $(TEXT_DEMO)
	$(BIN)/memformer generate $(TEXT_DEMO) --prompt "import os" --max_new_tokens 400 --temperature 0.7 --seed 1
	@echo
	@echo "Open $(TEXT_DEMO)/summary.html. Then try:"
	@echo "  $(BIN)/memformer train $(TEXT_DEMO) --resume --training.num_updates 2000     continue training"
	@echo "  $(BIN)/memformer generate $(TEXT_DEMO) --prompt_file FILE --save_session STATE  save the memory for later"

# Three processes for two cores, because some tests wait.
PARALLEL = -n 3 --dist worksteal
SHAPES = --jaxtyping-packages=memformer,beartype.beartype
# The tests of the parts check shapes and types at every call; the rest runs without (tests/conftest.py).
CHECKED = $(PARALLEL) --part checked $(SHAPES)
REST = $(PARALLEL) --part rest
test: setup
	$(BIN)/pytest $(CHECKED)
	$(BIN)/pytest $(REST)

# The same tests with the oldest torch that is supported.
test-oldest: .venv-oldest/.complete
	.venv-oldest/bin/python -m pytest $(CHECKED)
	.venv-oldest/bin/python -m pytest $(REST)

.venv-oldest/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==2.11.0/; s/^setuptools==.*/setuptools<82/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[dev]'
	touch $@

# Laws and measurements on a machine with one GPU, without a network: torch and the few packages that the library
# imports must be there. Ends after nine minutes; run again, it goes on where it ended. DATA holds mnist/ for Table 1.
OUTPUT ?= runs/gpu
DATA ?= data
cuda:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --minutes 8 --output $(OUTPUT) --data $(DATA)

# Builds the documentation site in site/: open site/index.html. Warnings, such as broken links, are errors.
docs: .venv/.docs
	$(BIN)/python docs/make_site.py

.venv/.docs: .venv/.complete
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	$(COMPILE_PACKAGES)
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Long-running tests: more tests with the checks of shapes and types, kills at random times, documents of growing
# length, long streams, damaged files.
soak: setup
	$(BIN)/pytest $(PARALLEL) $(SHAPES) --hypothesis-profile searching tests/data tests/generation tests/utils
	$(BIN)/python -m tests.soak.kills --kills 200
	$(BIN)/python -m tests.soak.flat_memory
	$(BIN)/python -m tests.soak.long_horizon
	$(BIN)/python -m tests.soak.compiled_training
	$(BIN)/python -m tests.soak.fuzz --cases 1000000

# Builds the sdist and the wheel, and tests the installed wheel outside the source tree.
packages: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python tests/smoke_installed_wheel.py dist

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest dist build site
