# make demo   set up and train a VAE on handwritten digits     make check  lint, format, types
# make test   set up and pass the tests                        make bench  time it against peers
# make test-all   the products and other libraries too         make test-range TORCH=2.10.0   with another torch
# make docs   build the site into build/site
VENV ?= .venv
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: demo test test-all test-range check-floor check bench bench-gpu gpu docs format clean
demo: $(VENV)/built
	python examples/digits.py

PYTEST := python -m pytest --numprocesses 2 --dist loadfile
test: $(VENV)/built
	$(PYTEST)

test-all: test $(VENV)/triton-3.6.0 $(VENV)/others
	OLDEST_TRITON=$(abspath $(VENV))/triton-3.6.0 $(PYTEST) --products rest

# The core tests of the source archive with any torch and Python, in an environment of their own. Left out are Triton's
# interpreter and what only the documentation and other libraries need. Gigabytes: torch's default build is for CUDA.
RANGE := $(abspath build/range-$(TORCH))
test-range:
	@test -n "$(TORCH)" || { echo "usage: make test-range TORCH=2.10.0 [PYTHON=python3.10]"; exit 2; }
	rm -rf $(RANGE)
	$(PYTHON) -m venv $(RANGE)
	mkdir $(RANGE)/source
	grep -vE '^(torch|triton|ruff|mypy|clang-format)==' requirements-dev.txt > $(RANGE)/requirements.txt
	$(RANGE)/bin/pip install --quiet torch==$(TORCH) --requirement $(RANGE)/requirements.txt
	$(RANGE)/bin/python setup.py --quiet sdist --dist-dir $(RANGE)
	tar xzf $(RANGE)/fastvae-*.tar.gz --strip-components 1 --directory $(RANGE)/source
	cd $(RANGE)/source && ../bin/python setup.py --quiet build_ext --inplace
	cd $(RANGE)/source && ../bin/python -m pytest --numprocesses 2 --dist loadfile --products all -k "not triton" \
	  $(foreach t,aot benchmarks_gpu contributing demo docs examples integrations,--ignore tests/test_$(t).py)

check-floor:  # every source against the oldest torch's headers; its wheel has 0.9 GB
	rm -rf build/floor
	$(PYTHON) -m pip download --quiet --no-deps --dest build/floor torch==2.10.0
	$(PYTHON) .ci/syntax.py build/floor/torch-*.whl

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

$(VENV)/triton-3.6.0: $(VENV)/installed  # whose interpreter fails with a newer numpy
	pip install --quiet --no-deps --target $@ triton==3.6.0 'numpy<2.4'

$(VENV)/built: $(VENV)/installed $(SOURCES) setup.py pyproject.toml
	python setup.py --quiet build_ext --inplace
	FASTVAE_NO_EXTENSION=1 pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastvae/*.so
