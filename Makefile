# make book | make test: everything from a fresh clone with Python 3.11 to 3.13, git and make.
# In an environment of your own (conda activate lookalike): make test PY=python

PY ?= .venv/bin/python
CHAPTERS := $(wildcard book/chapters/*.md)
EXECUTED := $(CHAPTERS:%.md=build/nb/%.ipynb)
# what a chapter's outputs depend on; the command line and the pages' machinery are not part of it
SOURCES := $(shell find lib/lookalike -name '*.py' -not -name cli.py -not -name bookio.py -not -name pages.py -not -name brackets.py) data_manifest.yaml
PAGES := $(shell find book CHANGELOG.md -type f -not -path '*/.ipynb_checkpoints/*') $(wildcard lib/lookalike/bookio.py lib/lookalike/pages.py)
SITE := build/site/_build/html/index.html

# real data beside the project, if it is there
ifneq ($(wildcard ../shared/data/.),)
export LOOKALIKE_MIRROR ?= $(abspath ../shared/data)
endif

# one thread per process: two test workers on two cores
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

BIN := $(patsubst ./,,$(dir $(PY)))
ifeq ($(PY),.venv/bin/python)
ENVIRONMENT := .venv/.installed
endif

.DELETE_ON_ERROR:
.PHONY: book test setup full data readme bench format clean

book: $(SITE)
	@echo "The book: $(SITE)"

$(SITE): $(ENVIRONMENT) $(EXECUTED) $(PAGES)
	$(BIN)jupyter-book build book --path-output build/site --all -W -n --keep-going
	@touch $@

# Each chapter once, small; the test and the page share the outputs.
build/nb/book/chapters/%.ipynb: book/chapters/%.md book/reported/%.csv $(SOURCES) $(ENVIRONMENT)
	$(ONE_THREAD) $(PY) -m pytest --nbmake -q $<

test: $(ENVIRONMENT) $(EXECUTED)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(ONE_THREAD) $(PY) -m pytest -n 2 tests

setup: $(ENVIRONMENT)

.venv/.installed: pyproject.toml constraints.txt
	@./.ci/install
	@touch $@

full: $(ENVIRONMENT)
	@test -n "$(CH)" || { echo "Name the chapter: make full CH=$(firstword $(basename $(notdir $(CHAPTERS))))"; exit 2; }
	$(BIN)lookalike run $(CH) --scale full --resume

data: $(ENVIRONMENT)
	$(BIN)lookalike data fetch --all

bench: $(ENVIRONMENT)
	for script in benchmarks/*.py; do $(ONE_THREAD) $(PY) $$script || exit 1; done

readme: $(ENVIRONMENT)
	$(PY) -m lookalike.pages

# Code and chapters in the form that the tests ask for: chapters as jupytext writes them.
format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix --exit-zero
	$(PY) -m ruff format
	@mkdir -p build
	for page in $(CHAPTERS); do \
	  $(BIN)jupytext --quiet --to ipynb --output build/format.ipynb $$page && \
	  $(BIN)jupytext --quiet --to md:myst --output $$page build/format.ipynb || exit 1; \
	done

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis
