# make demo           environment, install, the sprites example, a report to open
# make test           environment, install with what the tests need, lint, types, tests: about thirteen minutes on two cores
#                     beside the install
# make test-fast      the tests that need milliseconds: neither slow nor distributed, about three minutes
# make docs           the documentation into site/, strictly: open site/index.html, no server is needed
# make environments   the recipes of frameworks that need an environment of their own, two minutes
# make test-browser   the report in a real browser; needs Chromium (apt-get install chromium, or its path in CHROMIUM)
# make minimal        the fast tests with the lowest versions that pyproject.toml allows, in .cache/minimal (7 GB)
# make newest         the same with the newest versions, in .cache/newest (7 GB); TESTS="tests/losses" takes some of them

PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: demo test test-fast test-browser lint types unit environments wheel minimal newest benchmark clean

demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(PY) examples/demo.py --out runs/demo --report

test: lint types unit

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)
	$(PY) -m mypy

unit: $(STAMP)
	$(PY) -m pytest -n auto --dist loadscope

test-fast: $(STAMP)
	$(PY) -m pytest -n auto --dist loadscope -m "not slow and not distributed"

test-browser: $(STAMP) docs
	$(PY) -m pytest tests/browser

.PHONY: docs
docs: .venv/.installed-docs
	$(PY) docs/stage.py
	$(PY) -m zensical build --strict --clean

.venv/.installed-docs: $(STAMP)
	$(PY) -m pip install --quiet -e '.[docs]'
	touch $@

environments: $(STAMP)
	PY=$(PY) sh tests/environments/huggingface.sh
	PY=$(PY) sh tests/environments/stable_pretraining.sh

wheel: $(STAMP)
	PY=$(PY) sh tests/wheel.sh

minimal newest:
	PYTHON=$(PYTHON) sh tests/versions.sh $@ $(TESTS)

benchmark: $(STAMP)
	$(PY) benchmarks/losses.py --out docs/benchmarks

# torch and torchvision come from one index in one call, so that the resolver takes a pair that fits.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: this is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet torch torchvision
	$(PY) -m pip install --quiet -e '.[test]'
	$(PY) -c 'import torch, torchvision'
	touch $(STAMP)

clean:
	rm -rf .venv build dist site runs *.egg-info .pytest_cache .mypy_cache .ruff_cache
