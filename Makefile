# `make demo` and `make test` come first. Each sets up .venv by itself the first time; with another
# torch, such as TORCH=2.6 of pyproject.toml, in .venv-2.6.
PYTHON ?= python3
VENV := .venv$(TORCH:%=-%)
BIN := $(VENV)/bin

.PHONY: demo notebook figures test test-slow test-triton faults test-all lint types docs package clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py --out demo-run

# examples/first_run.ipynb with what it shows when it is run now.
notebook: $(VENV)/dev.stamp
	$(BIN)/python examples/renew_notebook.py

# The figures of docs/benchmarks.md, measured again (hours, on a quiet machine); some of them:
# make figures ONLY="step_ input-256"
UNICL_TEST_DATA ?= ../shared/data
figures: $(VENV)/dev.stamp
	$(BIN)/python docs/site/figures.py --test-data $(UNICL_TEST_DATA) --work build/figures \
		$(if $(ONLY),--only $(ONLY))

# A process of tests for each core and one more, since many tests wait for others; those of a file
# stay together, since they share what they made. A process that crashes ends the run and its test
# is named: with another in its place, xdist (3.8) waits for ever at the end.
JOBS ?= $$(($$(nproc) + 1))
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile \
	--max-worker-restart 0

test: $(VENV)/dev.stamp
	$(PYTEST)

# What `test` leaves out because it takes minutes, as far as it does not take many; and tests of
# properties again, by ten times as many examples.
test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m "(slow or hypothesis) and not long and not gpu" --hypothesis-profile many

# Our kernels as other versions of Triton compile them: the oldest that all these tests suit, and the
# one that uv.lock gives. A version that cannot be downloaded is skipped, and said to be.
TRITONS ?= 3.6.0 $(shell sed -n '/^name = "triton"/{n;s/version = "\(.*\)"/\1/p;q}' uv.lock)
test-triton: $(VENV)/dev.stamp
	@for version in $(TRITONS); do \
		folder=build/triton-$$version; \
		test -d $$folder/triton || $(BIN)/python -m pip install --quiet --no-deps --target $$folder \
			triton==$$version || { echo "SKIPPED: Triton $$version cannot be had"; continue; }; \
		echo "Triton $$version"; \
		PYTHONPATH=$$folder $(PYTEST) -m "not gpu and not long" \
			tests/gpu_path/test_compiled_kernels.py || exit 1; \
	done

# The tests of the fault table in docs/reliability.md.
faults: $(VENV)/dev.stamp
	$(PYTEST) -m "not gpu" $$(grep -o 'tests/[a-z_/]*\.py::[a-z0-9_]*' docs/reliability.md | sort -u)

# Everything that a machine without a GPU can run.
test-all: $(VENV)/dev.stamp
	$(PYTEST) -m "not gpu" --hypothesis-profile many

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked as an install lays the rooms out, where mypy sees the imports that Python sees.
types: $(VENV)/dev.stamp
	rm -rf build/installed
	$(BIN)/python setup.py --quiet build_py --build-lib build/installed
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p unicl_fast

# The site of docs/, read from build/site/index.html; a link that leads nowhere is an error, though
# not with --quiet, under which mkdocs (1.6) counts no warnings.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The sdist, and the wheel that is built out of it, as they would be uploaded.
package: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv* build dist demo-run *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unicl_fast needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# A stamp is made when the install succeeded; a changed pyproject.toml installs again.
$(VENV)/%.stamp: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$*]' $(TORCH:%='torch==%.*')
	touch $@
