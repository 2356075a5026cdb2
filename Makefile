# make demo   set up and train a VAE on handwritten digits     make check  lint, format, types
# make test   set up and pass the tests                        make bench  time it against peers
# make docs   build the site into build/site
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test check bench bench-gpu gpu docs format clean
demo: $(VENV)/built
	python examples/digits.py

test: $(VENV)/built $(VENV)/triton-3.7.1 $(VENV)/others
	OLDEST_TRITON=$(abspath $(VENV))/triton-3.7.1 python -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/built
	python -m pytest benchmarks --benchmark-json=benchmarks/last.json
	python -m benchmarks.scaling

docs: $(VENV)/built $(VENV)/others
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench-gpu: $(VENV)/built
	python -m pytest benchmarks --device cuda --benchmark-json=benchmarks/last-gpu.json

gpu:  # with the Python, torch and Triton that are there; nothing is installed
	$(PYTHON) benchmarks/first_gpu.py

check: $(VENV)/installed
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(SOURCES)
	mypy

format: $(VENV)/installed
	ruff check --fix .
	ruff format .
	clang-format -i $(SOURCES)

$(VENV)/installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/others: requirements-test.txt $(VENV)/installed
	pip install --quiet --requirement $<
	touch $@

$(VENV)/triton-3.7.1: $(VENV)/installed
	pip install --quiet --no-deps --target $@ triton==3.7.1

$(VENV)/built: $(VENV)/installed $(SOURCES) setup.py pyproject.toml
	python setup.py --quiet build_ext --inplace
	FASTVAE_NO_EXTENSION=1 pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastvae/*.so
