# Two commands on a fresh machine with Python, make and a package index: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow lint fuzz hostile interop interop-llamacpp bench bench-qwen pictures clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)            ## a real model to 8 and 4 bits, drift measured, reports/demo.html
	$(BIN)/qwenq demo

test: $(STAMP)            ## the fast tests, 5 minutes on two new cores, 16 on two old ones
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(STAMP)       ## the slower checks: kills at random points, memory growth, layers of real shapes over fake tensors
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

fuzz: $(STAMP)            ## hostile input for every reader, 100,000 cases; counts and findings in reports/fuzz.json
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases 100000 --json reports/fuzz.json

hostile: $(STAMP)         ## sources that change, damaged jobs, templates, special files, broken clients of both servers
	PYTHONPATH=tests:tests/pipeline $(BIN)/python -m changing_source --sources 300 --damages 1000
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases 500 --only "chat templates" --seed 1
	PYTHONPATH=tests $(BIN)/python -m fuzz --cases 300 --only "special files" --seed 1
	$(BIN)/python tests/hostile_clients.py --each 1000

interop: $(STAMP)         ## GPTQModel, and transformers through optimum, load what this project writes
	VENV=$(VENV) bash interop/run.sh

interop-llamacpp: $(STAMP) ## llama.cpp's tools built from source; layers, importance matrix and reference logits checked
	VENV=$(VENV) bash interop/build_llamacpp.sh
	PATH="$(CURDIR)/$${INTEROP_ENVS:-.interop}/llama.cpp/bin:$$PATH" $(BIN)/python -m pytest -m llamacpp
	$(BIN)/python interop/check_llamacpp_layers.py --bin $${INTEROP_ENVS:-.interop}/llama.cpp/bin

bench: $(STAMP)           ## this project and GPTQModel side by side: KL, perplexity, top-1, bits, time, memory
	VENV=$(VENV) bash benchmarks/run.sh

bench-qwen: $(STAMP)      ## the same on a real Qwen2.5 of 0.5 billion parameters (480 MB fetched), 4-bit g128, and more tools
	[ -e out/qwen25/config.json ] || $(BIN)/python benchmarks/make_qwen_model.py out/qwen25
	VENV=$(VENV) BENCH_TOOLS="$${BENCH_TOOLS:-qwenq gptqmodel gptqmodel-mse llmcompressor autoround}" \
	BENCH_MODEL=out/qwen25 BENCH_GROUP_SIZE=128 BENCH_OUT=$${BENCH_OUT:-out/bench-qwen} bash benchmarks/run.sh

pictures: $(STAMP)        ## the pictures of README.md and docs/, from recorded figures and headless Chromium
	$(BIN)/python docs/make_pictures.py

clean:
	rm -rf $(VENV) .interop out build dist *.egg-info
