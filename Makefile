# Every target sets itself up in .venv; nothing is installed outside it.
PYTHON ?= python3
OUT ?= demo_output
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: demo test build bench lint clean

demo: build
	$(BIN)/aar demo $(OUT)

# One thread each, and as many processes as there are cores: most tests are too small for two threads.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

build: $(INSTALLED)
	$(BIN)/python -m aar_kernels.build

bench: build
	$(BIN)/python -m aar_kernels.bench

lint: $(INSTALLED)
	$(PIP) ruff
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info aar_kernels/*.so aar_kernels/_build_info.json $(INSTALLED)

# torch comes first and by its exact version, so that nothing installed later chooses another build of it. The codecs of
# the last line would do that, or bring a torchaudio that does not load beside it: their tests need neither, and are
# skipped where a package is not to be had.
$(INSTALLED): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) setuptools pybind11 ninja
	$(PIP) --no-build-isolation --editable '.[test]'
	-$(PIP) --no-deps --no-build-isolation encodec descript-audio-codec moshi
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed (PYTHON=...)")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "No virtual environment: sudo apt install python3-venv (Debian, Ubuntu), or PYTHON=..." >&2; exit 1; }
