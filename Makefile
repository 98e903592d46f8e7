# Two commands on a bare machine: `make demo` and `make test`. Both create .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup demo test lint coverage clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(RUN)/secateur demo

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

test: lint
	$(RUN)/pytest -n 2 --dist loadfile --durations=15

# Tracing under coverage takes twice as long, so it is measured apart.
coverage: setup
	$(RUN)/pytest -n 2 --dist loadfile --cov --cov-fail-under=85

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
