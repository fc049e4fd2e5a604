# `make help` says what there is.
.DEFAULT_GOAL := help
SHELL := bash
export OMP_WAIT_POLICY ?= passive

E := .venv/embedder/bin
T := .venv/trainer/bin
SHAPES := $(T)/python bench/shapes.py --data runs/shapes --validation runs/shapes-validation --cache smollm2=runs/shapes-smollm2

define STUDY_CACHE
$(E)/lift-embed model $(1)
$(E)/lift-embed fill runs/study/reported/captions.txt --cache runs/study/$(1) --model $(1) --snapshot
endef

.PHONY: help setup demo test test-fast test-tools test-service test-e2e torture torture-short lint format \
        fast-embedder fast-trainer fast-report slow-embedder slow-trainer slow-tools \
        bench-posembed bench-emoji bench-cache bench-encodings bench-efficiency bench-order bench-server bench-shapes bench-trainer study study-full clean

help:  ## say what there is
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make both environments, .venv/embedder and .venv/trainer (once)
	@scripts/setup.sh embedder
	@scripts/setup.sh trainer

demo: setup  ## the whole pipeline on 3,584 emoji and their names, ending with runs/demo/report.html
	@$(T)/python scripts/demo.py

test: lint test-fast test-tools test-service test-e2e torture-short  ## everything that CI runs: lint, types, all tests

test-fast: setup  ## the tests that need no engine and no server of ours, but for slow ones (a minute)
	@$(MAKE) --no-print-directory -j2 --output-sync=target fast-trainer fast-embedder fast-report

fast-embedder:
	$(E)/pytest -q -m 'not slow' tests/unit/project tests/unit/cache tests/unit/embedder

fast-trainer:
	$(T)/pytest -q -m 'not slow' tests/unit/trainer

fast-report:
	$(T)/pytest -q -m 'not slow' tests/unit/data tests/unit/report

test-tools: setup  ## the slow ones, and what lift-cache does with real caches: convert, repair, plan, move
	@$(MAKE) --no-print-directory -j2 --output-sync=target slow-trainer slow-embedder slow-tools

slow-embedder:
	$(E)/pytest -q -m slow --durations=5 tests/unit/project tests/unit/cache tests/unit/embedder

slow-tools:
	$(E)/pytest -q --durations=5 tests/tools tests/torture/test_disk.py

slow-trainer:
	$(T)/pytest -q -m slow --durations=5 tests/unit/trainer tests/unit/data tests/unit/report

test-service: setup  ## the real vLLM engine, a real server and browser, kill -9, full disks, overload
	$(E)/pytest -q --durations=8 --ignore=tests/crash/test_training_killed.py tests/crash tests/service

test-e2e: setup  ## captions → server → cache → trainer → report, in small; a trainer killed again and again
	$(T)/pytest -q --durations=5 tests/e2e tests/crash/test_training_killed.py

.PHONY: compose-check
compose-check: setup  ## compose files, Dockerfiles; with a container engine also build, up, kill, up again, down
	@$(E)/python scripts/compose_check.py

torture: setup  ## try to break what docs/cache.md promises: power loss, kill -9, damage, full disks (half an hour)
	$(E)/python tests/torture --full

torture-short: setup  ## a five-minute share of it
	$(E)/python tests/torture --budget 300

lint: setup  ## ruff and mypy
	$(E)/ruff check .
	$(E)/ruff format --check .
	$(E)/mypy shared/lift_cache services/embedder/lift_embedder
	$(T)/mypy services/trainer/lift_trainer

format: setup  ## let ruff fix and format what it can
	$(E)/ruff check --fix .
	$(E)/ruff format .

bench-posembed: setup  ## position embeddings on generated scenes, five seeds (25 minutes on 2 free cores)
	$(T)/lift-data shapes runs/shapes
	$(T)/python bench/posembed.py --data runs/shapes --out runs/posembed

bench-shapes: setup  ## text transforms on generated scenes, five seeds (25 minutes on 2 free cores)
	$(E)/lift-embed model smollm2
	$(T)/lift-data shapes runs/shapes
	$(T)/lift-data shapes runs/shapes-validation --seed 2
	$(E)/lift-embed fill runs/shapes/*.tar runs/shapes-validation/*.tar --cache runs/shapes-smollm2 --model smollm2 --snapshot
	for choice in first then; do $(SHAPES) --list | OMP_NUM_THREADS=1 xargs -P 2 -I{} $(SHAPES) --only {} || exit 1; done
	$(SHAPES)

bench-emoji: demo  ## text transforms and controls on unseen emoji, three seeds (25 minutes on 2 free cores)
	$(T)/python bench/emoji.py --data runs/demo/data --cache minilm=runs/demo/cache

bench-cache: setup  ## reading, writing and opening caches (half an hour, 8 GB of disk)
	$(E)/python bench/cache.py --out runs/bench-cache.json

bench-encodings: demo  ## what each encoding costs in neighbours, on the demo's captions
	$(E)/python bench/encodings.py --cache runs/demo/cache --out runs/bench-encodings.json

bench-server: setup  ## the server against vLLM's own and the engine alone; hits (20 minutes on 2 free cores)
	$(E)/lift-embed model minilm
	$(E)/lift-embed model smollm2
	$(E)/python bench/server.py --out runs/bench-server.json

bench-efficiency: setup  ## what a fixed text encoder saves in FLOPs, memory and time (a quarter of an hour)
	$(T)/python bench/efficiency.py --out runs/bench-efficiency.json

bench-order: setup  ## shuffling by blocks against a full permutation (ten seconds)
	$(T)/python bench/order.py --out runs/bench-order.json

study: setup  ## a fixed text encoder beside joint training, in small: a preview of study-full (10 minutes)
	$(T)/lift-data paraphrases runs/study/reported
	$(call STUDY_CACHE,minilm)
	$(call STUDY_CACHE,smollm2)
	OMP_NUM_THREADS=2 $(T)/python bench/study.py preview

study-full: setup  ## the study that docs/results.md quotes, or what is left of it (bench/study.yaml; prints its hours)
	$(T)/lift-data paraphrases runs/study/reported
	$(T)/lift-data paraphrases runs/study/validation --seed 2
	$(call STUDY_CACHE,minilm)
	$(call STUDY_CACHE,smollm2)
	$(call STUDY_CACHE,smollm2-random)
	OMP_NUM_THREADS=1 $(T)/python bench/study.py run
	$(T)/python bench/study.py report

bench-trainer: setup  ## the trainer's loader, its text vectors, lift beside clip (10 minutes on 2 free cores)
	$(T)/python bench/trainer.py --out runs/bench-trainer.json

clean:  ## remove runs/ and caches of tools; environments and prepared models stay
	rm -rf runs .mypy_cache .ruff_cache .hypothesis
