# Everything here needs only Python 3.11+ and make. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV := PIP_DISABLE_PIP_VERSION_CHECK=1

.DEFAULT_GOAL := help
.PHONY: help install reproduce tables encoders tiny pacore test soak check format bench clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/ok ## make .venv with the pinned versions of constraints.txt

$(VENV)/ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"'
	$(PYTHON) -m venv $(VENV)
	$(ENV) $(BIN)/python -m pip install -q -c constraints.txt torch
	$(ENV) $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

ENCODERS := experiments/encoders
# of the cores: two encoders at a time
HALF = $(shell $(BIN)/python -c 'import os; print(max(1, (os.cpu_count() or 1) // 2))')
reproduce: $(VENV)/ok ## ablation Table 4 at tiny scale, from nothing: data, encoders, training, table, picture
	$(BIN)/step3vl data make corpus-ablation --recipe corpus/ablation.yaml --scale tiny
	export OMP_NUM_THREADS=$(HALF); \
		$(BIN)/step3vl chain $(ENCODERS)/dinov3 --scale tiny & other=$$!; \
		$(BIN)/step3vl chain $(ENCODERS)/pe_lang --scale tiny && wait $$other
	$(BIN)/step3vl ablate run ablations/table4_vision_encoder --scale tiny --seeds 2 --only pe_lang --only dinov3
	$(BIN)/step3vl ablate table ablations/table4_vision_encoder --scale tiny

encoders: $(VENV)/ok ## Table 4's tiny encoders, each pre-trained by its own objective; PE-lang, DINOv3, SigLIP 2
	$(BIN)/step3vl data make corpus-ablation --recipe corpus/ablation.yaml --scale tiny
	export OMP_NUM_THREADS=$(HALF); \
		$(BIN)/step3vl chain $(ENCODERS)/dinov3 --scale tiny & other=$$!; \
		$(BIN)/step3vl chain $(ENCODERS)/pe_lang --scale tiny && wait $$other
	$(BIN)/step3vl chain $(ENCODERS)/siglip2 --scale tiny

TUNE_STEPS := 160
TABLES := table4_vision_encoder table5_optimizer table6_deepstack
tables: encoders ## docs/results: Tables 4, 5 and 6 at tiny scale, three seeds a row, with intervals (about 2 hours; goes on)
	$(BIN)/step3vl data make corpus-shuffled --recipe corpus/shuffled.yaml --scale tiny
	$(BIN)/step3vl fit -c ablations/table5_optimizer/_start.yaml --scale tiny --ckpt_path=last
	for table in $(TABLES); do \
		$(BIN)/step3vl ablate tune ablations/$$table --scale tiny --steps $(TUNE_STEPS) && \
		$(BIN)/step3vl ablate run ablations/$$table --scale tiny --seeds 3 && \
		$(BIN)/step3vl ablate report ablations/$$table --scale tiny || exit; \
	done

tiny: $(VENV)/ok ## pre-training, SFT, RLVR and RLHF at tiny scale, one verdict line a stage
	$(BIN)/step3vl data make corpus --scale tiny
	$(BIN)/step3vl chain experiments/step3vl_10b --scale tiny

pacore: $(VENV)/ok ## PaCoRe training at tiny scale, after `make tiny`: warm start, pools, PPO, the scaling curve
	$(BIN)/step3vl pacore train experiments/step3vl_10b/7_pacore.yaml --scale tiny

test: $(VENV)/ok ## the test suite (about a quarter of an hour on two cores)
	$(BIN)/python -m pytest -n 2

SOAK_S := 7200
SOAK_DIR :=
soak: $(VENV)/ok ## the night's tests, ending with a table of figures (SOAK_S=7200 s of one run; SOAK_DIR=where to write)
	STEP3VL_SOAK_S=$(SOAK_S) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults tests/saving tests/data -m slow --timeout=7200 \
		$(if $(SOAK_DIR),--basetemp=$(SOAK_DIR)/step3vl-soak)

check: $(VENV)/ok ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/ok ## rewrite to house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/ok ## benchmarks, as ratios within one run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-enable --benchmark-timer=time.process_time -s

clean: ## remove .venv and caches; runs/ and corpus/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
