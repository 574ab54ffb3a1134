# make demo: set-up and the main job on the embedded data.  make test: set-up, lint, tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: setup demo test slow lint clean

setup: $(VENV)/ready

$(VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,peers]'
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/python -m qat.train --model=mobilenet_v2 --output_dir=$(DEMO)
	$(BIN)/python -m export.tflite --model=$(DEMO)/qat.keras --output=$(DEMO)/model.tflite
	$(BIN)/python -m export.check --model=$(DEMO)/model.tflite
	$(BIN)/python -m eval.accuracy --model=$(DEMO)/model.tflite --dataset=digits \
		--reference=$(DEMO)/float.keras --output_dir=$(DEMO)
	$(BIN)/python -m eval.parity --model=$(DEMO)/qat.keras --dataset=digits --split=validation \
		--limit=20 --output_dir=$(DEMO)
	$(BIN)/python -m eval.latency --model=$(DEMO)/model.tflite --output_dir=$(DEMO)
	$(BIN)/python -m eval.report --rows=$(DEMO)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/pytest -m 'not slow' -n 2 --dist=worksteal

# Qualcomm's libraries come under a licence of their own: docs/hexagon.md.
$(VENV)/hexagon: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[hexagon]'
	touch $@

# Real networks and images, where LOWBIT_DATA names a folder of them; kill and resume; the emulated lab.
slow: setup $(VENV)/hexagon
	$(BIN)/pytest -m slow -n 2 --dist=loadfile

clean:
	rm -rf $(VENV) runs build *.egg-info
