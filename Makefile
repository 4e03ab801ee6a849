# make demo   explains pictures with the network in the package (no torch)
# make test   sets up everything and runs the tests
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test clean

demo: .venv/demo-ready
	$(BIN)/camrt demo

test: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.venv/demo-ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('camrt needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11' if not (3, 11) <= sys.version_info[:2] <= (3, 13) else 0)"
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[cpu]'
	touch $@

.venv/test-ready: .venv/demo-ready
	$(PIP) torch --constraint constraints.txt
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
