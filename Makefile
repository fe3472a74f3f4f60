# Both targets need Python >= 3.11 and a package registry, nothing else.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
BIN = $(VENV)/bin

.PHONY: demo test lint
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

test: export HF_HUB_OFFLINE = 1
test: $(VENV)/.dev
	@echo "== Testing"
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
