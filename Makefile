# Everything sets itself up in .venv first, once; `make demo` and `make test` are all that a fresh clone needs.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
QUIET := DICLIP_HEADLESS=1 MPLBACKEND=agg
# Threads that spin while they wait make everything several times slower on a machine that has other work.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test lab explore notebooks results

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("found Python %d.%d, expected 3.11 or newer: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

.venv/ready-test: .venv/ready
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q -c constraints.txt -e '.[crf]' || echo "the dense CRF could not be installed (see above; it needs a C++ compiler): its tests are skipped"
	@touch $@

setup: .venv/ready  ## install into .venv

demo: .venv/ready  ## run the notebooks 00 to 05 and score the ladder, into runs/demo
	$(BIN)/diclip demo

test: .venv/ready-test  ## check style, code, parity, notebooks and, in a browser, the explorers
	@if [ "$$CI" = true ] && [ "$$(id -u)" = 0 ] && ! command -v chromium > /dev/null; then \
		apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; fi
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
	OMP_NUM_THREADS=1 $(QUIET) $(BIN)/python -m pytest -q -n 2 --dist loadscope --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=600 --nbval-kernel-startup-timeout=120 $(NOTEBOOKS)

lab: .venv/ready  ## open JupyterLab on this machine
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks

explore: .venv/ready  ## open the explorers on this machine, as a page of their own
	$(BIN)/voila notebooks/08_explorer.ipynb --Voila.ip=127.0.0.1 --token --progressive_rendering=True

notebooks: .venv/ready  ## execute every notebook again and keep the outputs
	$(QUIET) $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=None \
		--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS)

results: .venv/ready  ## measure again every number and draw again every figure that the README shows
	$(BIN)/diclip evaluate --split val --json data/results/clip-val.json
	$(BIN)/diclip evaluate --split shift --json data/results/clip-shift.json
	$(BIN)/diclip evaluate --split val --set minivoc_seed=7 --json data/results/clip-val-seed7.json
	$(BIN)/diclip data difficulty --json data/results/difficulty.json
	for m in clip-es excel; do $(BIN)/diclip evaluate --method $$m --split val --set baselines=false \
		--json data/results/$$m-val.json || exit; done
	$(BIN)/diclip evaluate --method diclip --split val --set ablate=true --json data/results/diclip-val.json
	$(BIN)/diclip evaluate --method diclip --split shift --json data/results/diclip-shift.json
	$(BIN)/diclip evaluate --method diclip --split val --set minivoc_seed=7 --set limit=300 \
		--json data/results/diclip-val-seed7.json
	for n in 0 1 2; do $(BIN)/diclip evaluate --method diclip --split val --set seed=$$n --set limit=300 \
		--set baselines=false --json data/results/diclip-noise$$n.json || exit; done
	$(BIN)/diclip effects --set limit=300 --json data/results/effects.json
	$(BIN)/diclip judge --json data/results/judge.json
	$(BIN)/diclip sweep params/sweep_seeds.yaml --json data/results/training.json
	$(BIN)/diclip evaluate --method diclip --trained --set limit=300 --set baselines=false --set background=fixed \
		--json data/results/network-tags.json
	$(BIN)/diclip evaluate --method diclip --trained runs/sweep-seeds/masks/seed=0 --set limit=300 --set baselines=false \
		--json data/results/network-masks.json
	$(BIN)/diclip sweep params/sweep_ablations.yaml --json data/results/ablations.json
	$(BIN)/diclip bench --preset voc --random-weights --json data/results/bench.json
	$(BIN)/diclip bench --explorer --json data/results/bench-explorer.json
	$(BIN)/python -m diclip.figures
