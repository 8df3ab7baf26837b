# make demo    quantize the built-in network and print what each method reaches
# make test    run the tests; make test-long: those that take long; make test-reference: without the native kernels
# make lint    check style and types of the code
# make docs    build the pages of docs/ and the API into build/site
# make clean   remove what was built and measured; .venv stays
#
# Each sets up what it needs in .venv, once. PY=python3 uses that Python's environment as it is instead: nothing is
# installed into it, its torch (a CUDA build, say) stays, and what it lacks is said.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist worksteal

ifdef PY
INTERPRETER := $(PY)
RUNTIME := check-runtime
DEVELOPMENT := check-development
DOCUMENTATION := check-documentation
BUILT := build/.built-by-$(subst /,-,$(PY))
export PYTHONPATH := $(CURDIR)/python:$(CURDIR)
else
INTERPRETER := .venv/bin/python
RUNTIME := .venv/.runtime
DEVELOPMENT := .venv/.development
DOCUMENTATION := .venv/.documentation
BUILT := build/.built
# torch looks for ninja on the path.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

INSTALL := .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt
# The package itself goes in without compiling: $(BUILT) compiles in place, and only what changed.
INSTALL_PACKAGE := GDFQ_BUILD=off $(INSTALL) --no-build-isolation --editable

# The wheel's, in the version that constraints.txt pins.
CLANG_FORMAT := $(INTERPRETER) -c 'import clang_format; clang_format.clang_format()'

.PHONY: demo test test-long test-reference lint docs clean check-runtime check-development check-documentation

demo: $(RUNTIME) $(BUILT)
	$(INTERPRETER) -m gdfq.demo --out demo-output

test: $(DEVELOPMENT) $(BUILT)
	OMP_NUM_THREADS=1 $(INTERPRETER) -m pytest $(PYTEST_ARGS)

test-long: PYTEST_ARGS += -m long
test-long: test

test-reference: export GDFQ_EXT := reference
test-reference: test

lint: $(DEVELOPMENT)
	$(INTERPRETER) -m ruff check .
	$(INTERPRETER) -m ruff format --check .
	$(INTERPRETER) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

docs: $(DOCUMENTATION)
	$(INTERPRETER) -m mkdocs build --strict

.venv/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch "setuptools>=77" "pybind11>=2.13" "ninja>=1.11"
	$(INSTALL_PACKAGE) ".[export]"
	touch $@

.venv/.development: .venv/.runtime
	$(INSTALL_PACKAGE) ".[dev]"
	touch $@

.venv/.documentation: .venv/.runtime
	$(INSTALL_PACKAGE) ".[docs]"
	touch $@

$(BUILT): setup.py gdfq_ext/_stamp.py $(shell find csrc -type f) | $(RUNTIME)
	$(INTERPRETER) setup.py build_ext --inplace
	touch $@

check-runtime:
	$(PY) .ci/missing_requirements.py

check-development:
	$(PY) .ci/missing_requirements.py dev

check-documentation:
	$(PY) .ci/missing_requirements.py docs

clean:
	rm -rf build dist demo-output reproduce-output *.egg-info python/*.egg-info gdfq_ext/*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
