# make demo           set up, serve the demo model with vLLM, ask it a question, stop
# make test           set up, check the style, build the docs, run the tests but for the slow ones
# make test-all       the same with the slow ones
# make test-nightly   the slow ones alone
#
# Tests run in 2 processes: make test WORKERS=4
# pytest takes ARGS:        make test ARGS=tests/test_config.py

VENV := .venv
READY := $(VENV)/.ready-demo
READY_FOR_TESTS := $(VENV)/.ready-test
INSTALLER := pyproject.toml packaging/install.sh packaging/stand_ins.py
WORKERS := 2
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS)
export PYTHON

.PHONY: setup demo test test-all test-nightly style-and-docs lint format docs clean

setup: $(READY)

$(READY): $(INSTALLER)
	packaging/install.sh $(VENV) demo
	touch $@

$(READY_FOR_TESTS): $(INSTALLER)
	packaging/install.sh $(VENV) test
	touch $@ $(READY)

demo: $(READY)
	$(VENV)/bin/python examples/serve_demo.py $(ARGS)

test: style-and-docs
	$(PYTEST) -m "not nightly" $(ARGS)

test-all: style-and-docs
	$(PYTEST) $(ARGS)

test-nightly: $(READY_FOR_TESTS)
	$(PYTEST) -m nightly $(ARGS)

style-and-docs: $(READY_FOR_TESTS)
	$(MAKE) --jobs=2 --no-print-directory lint docs

lint: $(READY_FOR_TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY_FOR_TESTS)
	$(VENV)/bin/ruff format .

docs: $(READY_FOR_TESTS)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site
