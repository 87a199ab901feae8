# Everything a newcomer needs: `make demo` and `make test` set themselves up in .venv the first time.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo demo-all test test-fast test-gpu test-ray lint docs clean

demo: $(READY)
	$(VENV)/bin/nst-det compare --config-file configs/compare/demo.yaml --output output/demo

# the other methods as well, each in one more row of the same table
demo-all: $(READY)
	$(VENV)/bin/nst-det compare --config-file configs/compare/demo.yaml --output output/demo METHODS \
	  "[ce, kd, fitnet, at, nst-poly, kd+nst-poly, nst-poly@det, nst-linear, nst-gaussian, vid, lp, cwd@det]"

test: $(READY) lint
	@$(VENV)/bin/python tools/sizes.py
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto -m "not detectron2 and not gpu"

# what a change breaks most often, within a minute on 2 cores: no training, no other processes
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto -m "not slow and not detectron2 and not gpu"

# on a machine with a GPU, which make test hides; with Detectron2 in another Python: python3 -m pytest -v -m gpu
test-gpu: $(READY)
	$(VENV)/bin/python -m pytest -v -m gpu tests/gpu

# needs the extra ray, 240 MB: .venv/bin/python -m pip install --constraint constraints.txt --editable ".[ray]"
test-ray: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m ray tests/comparison/test_ray.py

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) output build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
