# make demo   install into .venv and score a synthetic slide
# make test   install if needed and run the tests
# make lint   what CI asks of the code's form
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/wsi demo -o demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Editable: only a change of dependencies or of native code asks for another install.
.venv/installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find native -type f)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo
