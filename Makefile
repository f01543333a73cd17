# make demo           set up, serve the demo model with vLLM, ask it a question, stop
# make test           set up, check the style, build the docs, run the tests but for the slow ones
# make test-all       the same with the slow ones
# make test-nightly   the slow ones alone
#
# Tests run in 2 processes: make test WORKERS=4
# pytest takes ARGS:        make test ARGS=tests/test_config.py

VENV := .venv
READY := $(VENV)/.ready
WORKERS := 2
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
export PYTHON

.PHONY: setup demo test test-all test-nightly lint format docs clean

setup: $(READY)

$(READY): pyproject.toml packaging/install.sh $(wildcard packaging/*/pyproject.toml)
	packaging/install.sh $(VENV)
	touch $@

demo: $(READY)
	$(VENV)/bin/python examples/serve_demo.py $(ARGS)

test: lint docs
	$(PYTEST) -m "not nightly" $(ARGS)

test-all: lint docs
	$(PYTEST) $(ARGS)

test-nightly: $(READY)
	$(PYTEST) -m nightly $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .

format: $(READY)
	$(VENV)/bin/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site
