# `make` lists the commands; `make help-run` shows the variables of `make run`. Variables become
# options of the program behind a command: make run WORKERS=2 runs python -m scripts run --workers=2.
# A misspelled variable is therefore an error.

PYTHON ?= python3
# Python uses the packages of .venv, whatever the environment says.
unexport PYTHONHOME PYTHONPATH PYTHONPLATLIBDIR PYTHONSAFEPATH
VENV_PYTHON := .venv/bin/python
SCRIPTS := $(VENV_PYTHON) -m scripts

# Only variables on the command line are used, since the environment may contain an unrelated NAME,
# HOST or PORT. Quotes, spaces and dollars are passed unchanged. NAME=on becomes --name.
OWN := PYTHON VENV_PYTHON TORCH_INDEX TEST_OPTIONS SHELL MAKEFLAGS
given := $(filter-out $(OWN),$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
quoted = '$(subst ','\'',$(value $(1)))'
dashed = $(shell printf %s '$(1)' | tr A-Z_ a-z-)
option = $(if $(filter on,$(value $(1))),--$(call dashed,$(1)),$(if $(filter off,$(value $(1))),--no-$(call dashed,$(1)),--$(call dashed,$(1))=$(call quoted,$(1))))
options = $(foreach name,$(given),$(call option,$(name)))

.PHONY: help run status scale stop classify classify-batch evaluate digits shapes archive start image gateway gateway-reload gateway-stop upgrade rollback test test-light test-slow test-all fuzz chaos bench setup docs lint format lock lock-check clean

help: ## list the commands; help-run shows the variables of make run, and so on
	@awk -F ':[^#]*## ' '/^##@/ { print "\n" substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

help-%: setup
	@$(if $(filter classify-batch,$*),$(VENV_PYTHON) -m batch,$(SCRIPTS) $*) --help

##@ Serve
run: setup ## do everything: weights, archive, server, and a first answer
	@$(SCRIPTS) run $(options)

status: setup ## show workers, memory, queue and versions
	@$(SCRIPTS) status $(options)

scale: setup ## change the number of workers: make scale WORKERS=2
	@$(SCRIPTS) scale $(options)

stop: setup ## stop the server
	@$(SCRIPTS) stop $(options)

##@ Classify
classify: setup ## classify images: make classify IMAGE=cat.jpg, or IMAGES=folder OUTPUT=all.csv
	@$(SCRIPTS) classify $(options)

classify-batch: setup-batch ## folders of any size, with Ray: make classify-batch IMAGES=folder OUTPUT=folder
	@$(VENV_PYTHON) -m batch $(options)

evaluate: setup ## evaluate a served model: make evaluate IMAGES=folder-by-class
	@$(SCRIPTS) evaluate $(options)

##@ Your model
archive: setup ## build a model archive: make archive MODEL_FILE=pets.yaml
	@$(SCRIPTS) archive $(options)

# OMP_WAIT_POLICY=passive: waiting OpenMP threads sleep instead of spinning. On two busy cores,
# spinning took five times as much CPU time for training.
digits: setup-examples ## an example: a model from training to serving, about a minute
	@OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m examples.digits

shapes: setup-examples ## an example of a multi-label model, about two minutes
	@OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m examples.shapes

##@ Production
start: setup ## serve model archives: make start MODELS="pets densenet121"
	@$(SCRIPTS) start $(options)

image: setup ## a container image of model archives, built with docker or podman
	@$(SCRIPTS) image $(options)

gateway: setup ## nginx in front of the server, or of UPSTREAMS: HTTPS, API keys, limits, retries
	@$(SCRIPTS) gateway $(options)

gateway-reload: setup ## apply changed API keys and certificates to the gateway
	@$(SCRIPTS) gateway-reload $(options)

gateway-stop: setup ## stop the gateway after it has answered what is in flight
	@$(SCRIPTS) gateway-stop $(options)

upgrade: setup ## serve another model archive with zero downtime: make upgrade ARCHIVE=file
	@$(SCRIPTS) upgrade $(options)

rollback: setup ## serve the archive that the last upgrade replaced
	@$(SCRIPTS) rollback $(options)

##@ Tests
# Unit tests run in parallel; the others share servers, ports and a browser.
UNIT := tests/unit --numprocesses logical --maxprocesses 4
test: setup-tests ## test against a real TorchServe, and in a browser, about 8 minutes
test-light: setup-light ## the tests of make test that need no PyTorch: .venv has 1.4 GB

test test-light:
	@$(VENV_PYTHON) -m pytest $(UNIT) -m "not slow"
	@$(VENV_PYTHON) -m pytest --ignore=tests/unit -m "not slow" --require-integration $(TEST_OPTIONS)

test-slow: setup-all ## run the rest: chaos, costs, training, containers, Ray, all documents
	@$(VENV_PYTHON) -m pytest $(UNIT) -m slow
	@$(VENV_PYTHON) -m pytest --ignore=tests/unit -m slow $(TEST_OPTIONS)

test-all: test test-slow ## run both

fuzz: setup-tests ## thousands of corrupted images
	@$(VENV_PYTHON) -m tests.stress.fuzz

chaos: setup-tests ## five minutes of bad clients and killed workers
	@$(VENV_PYTHON) -m tests.stress.chaos

##@ Benchmarks
bench: setup-benchmarks ## compare with other servers, about 40 minutes; bench-NAME runs another benchmark
	@$(VENV_PYTHON) -m benchmarks compare

# bench-engines, bench-settings etc.; .venv/bin/python -m benchmarks lists them.
bench-%: setup-benchmarks
	@$(VENV_PYTHON) -m benchmarks $*

##@ Maintenance
setup: ## make .venv; setup-all, -batch, -benchmarks, -huggingface, ...
	@$(PYTHON) scripts/bootstrap.py run

# setup-NAME installs requirements/NAME.lock in addition to the run group; these names stand for
# several groups.
groups-all := pytorch evaluation tests docs precision batch timm lite0 huggingface
groups-benchmarks := $(groups-all) benchmarks
groups-examples := pytorch evaluation
groups-light := tests lite0
groups-tests := pytorch tests timm lite0 huggingface
setup-%:
	@$(PYTHON) scripts/bootstrap.py run $(or $(groups-$*),$*)

# Pages link to files in other folders, which are copied too. The last line removes a script of
# another server, which docs/site/offline-search.js replaces.
docs: setup-docs ## build the documentation site, with strict links: build/docs/site
	@rm -rf build/docs && mkdir -p build/docs/source
	@tar -c README.md LICENSE docs client/README.md deploy/README.md examples benchmarks/results | tar -x -C build/docs/source
	@cp docs/site/mkdocs.yml build/docs
	@.venv/bin/zensical build --strict --config-file build/docs/mkdocs.yml
	@find build/docs/site -name '*.html' -exec sed -i.bak '/iframe-worker/d' {} + && find build/docs/site -name '*.bak' -delete

lint: setup-all ## check style, types and words
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache --no-logo
	@.venv/bin/vermin --target=3.10- --no-tips --quiet batch client handler scripts benchmarks examples tests deploy
	@.venv/bin/vermin --target=3.6- --eval-annotations --no-tips --quiet scripts/bootstrap.py
	@$(VENV_PYTHON) -m pytest --quiet --no-summary tests/unit/test_wording.py

format: setup-tests ## put the code into the common style
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

# The run group and those of setup-all are resolved together, since .venv has all of them; benchmarks
# use the same versions. Each lock omits the packages of the locks that are installed before it (NEEDS
# in scripts/bootstrap.py). The locks of container images (container, gateway, ray) have the same
# versions and are complete; clients, moto and sbom have their own environments.
PIN := .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--generate-hashes --no-header --no-annotate
RUNNING := requirements/run.in client/pyproject.toml
before-huggingface := pytorch
before-precision := evaluation
before-timm := pytorch
before-tests := evaluation
before-benchmarks := pytorch evaluation
lock: setup ## pin all packages again, from requirements/*.in and the client's needs
	@$(PIN) $(RUNNING) $(groups-all:%=requirements/%.in) -o .venv/pins.txt >/dev/null
	@$(PIN) -c .venv/pins.txt $(RUNNING) -o requirements/run.lock >/dev/null
	@$(foreach group,$(groups-benchmarks),$(call pin,$(group)) &&) true
	@for group in container gateway ray; do \
		$(PIN) -c .venv/pins.txt requirements/$$group.in -o requirements/$$group.lock >/dev/null || exit; \
	done
	@for group in clients moto sbom; do \
		$(PIN) requirements/$$group.in -o requirements/$$group.lock >/dev/null || exit; \
	done

# A package that an earlier lock pins for some Pythons only (sympy) is kept, since the others may need
# it; CUDA's packages are omitted.
pin = $(PIN) -c .venv/pins.txt requirements/$(1).in -o requirements/$(1).lock >/dev/null \
	$$(sed -nE 's/^((torch|triton|nvidia|cuda)[a-z0-9.-]*)==.*/\1\n\1/p; s/^([a-z0-9.-]+)==[^;]*$$/\1\n\1/p; s/^([a-z0-9.-]+)==.*;.*/\1/p' \
		$(patsubst %,requirements/%.lock,run $(before-$(1))) | sort | uniq -d | sed 's/^/--no-emit-package=/')

lock-check: setup ## check that the locks can be installed on each Python and platform, a minute
	@$(VENV_PYTHON) -m tests.locks

clean: ## stop gateway and server, remove all that was built; .venv stays
	@if [ -x $(VENV_PYTHON) ]; then \
		$(SCRIPTS) gateway-stop && $(SCRIPTS) stop; fi
	@rm -rf build .run .mypy_cache .ruff_cache .pytest_cache .hypothesis model_store/*.mar
