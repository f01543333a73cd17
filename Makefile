# make demo   set up, serve the demo model with vLLM, ask it a question, stop
# make test   set up, check the style, build the docs, run the tests

VENV := .venv
READY := $(VENV)/.ready
export PYTHON

.PHONY: setup demo test lint format docs clean

setup: $(READY)

$(READY): pyproject.toml packaging/install.sh $(wildcard packaging/*/pyproject.toml)
	packaging/install.sh $(VENV)
	touch $@

demo: $(READY)
	$(VENV)/bin/python examples/serve_demo.py $(ARGS)

test: lint docs
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .

format: $(READY)
	$(VENV)/bin/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site
