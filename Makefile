# Everything is a command here. `make` alone says what there is: the lines below that begin with #:,
# and what stands behind ## in each command's own line.
#
#:Variables, all optional, on the command line: make run WORKERS=2 PORT=9080
#:  WORKERS=n           worker processes; otherwise as many as suit the machine
#:  PORT=n              predictions; MANAGEMENT_PORT and METRICS_PORT likewise
#:  GRPC=on             gRPC too, by which any client can stop the service (docs/operating.md);
#:                      GRPC_INFERENCE_PORT, GRPC_MANAGEMENT_PORT
#:  MODEL_FILE=file     for make archive and make run: a model file (.yaml) that says all
#:                      (docs/models.md); or an ONNX file, a folder in Hugging Face's form, or a
#:                      Python file with one nn.Module class. For the common cases these suffice:
#:  ARCH=resnet50       another of torchvision's classifiers, efficientnet_lite0, or timm/NAME
#:  WEIGHTS=file        weights of your own, or random; WEIGHTS_KEY=key of a state dict in the file
#:  CLASSES=file        classes of your own, in the order of the model's outputs
#:  NAME=name           of the model archive and of the model; otherwise the architecture's
#:  CHANNELS=bgr        the model's order of channels, if it is not rgb
#:  PRECISION=int8      or bf16, with OpenVINO, if the processor has it; IMAGES=folder of a few
#:                      hundred images to calibrate on and to measure the cost on
#:  ACTIVATION=sigmoid  a multi-label model
#:  LABELS=file         what each picture shows then, for make evaluate; MIN_PRECISION=share of
#:                      labels that must be right, or else the best F-score counts
#:  MODELS="a b"        which archives to start, side by side, or to pack into an image
#:  TAG=name:tag        of the image; BASE=image to build on, or debian; TARGET=ray for a Ray cluster
#:  MODEL=name          which of several models
#:  IMAGE=cat.jpg       a picture; IMAGES="folder b*.jpg" many; FORMAT, OUTPUT, TOPK, THRESHOLD
#:                      OUTPUT=vectors.npy (or .parquet) gets embeddings instead of labels
#:  ADDRESS=host:port   of a Ray cluster; COLUMN=of Parquet, ACTORS=n, EMBEDDING=on, OUTPUT=folder
#:  UPSTREAMS="a:8080"  servers that the gateway stands in front of; otherwise that of make run.
#:                      HOST, HTTP_PORT, HTTPS_PORT, KEYS, CERTIFICATE, CERTIFICATE_KEY, ACME, RATE,
#:                      BURST, CONNECTIONS, PROXIES, PREFIX, KEEPALIVE, TIMEOUT, LOG:
#:                      docs/going-public.md
#:  FOREGROUND=on       for make start and make gateway: run until SIGTERM, for a supervisor
#:  ARCHIVE=file        the new archive; AGREEMENT=share of samples whose label must not change
#:  TEST_OPTIONS=...    options for pytest, such as --require-browser
#:  PYTHON=python3.12   the Python to make the virtual environment with
#:  TORCH_INDEX=address where to take torch from, such as PyTorch's CPU-only index

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

# Which command has which variables; every other one is refused. A command reads its own from the
# environment, as GIVEN_WORKERS and so on, where quotes and spaces in them stay what they are
# (scripts/terminal.py). Only the command line's count: an environment may hold a NAME, a HOST or a
# PORT by chance.
packing := MODEL_FILE ARCH WEIGHTS WEIGHTS_KEY CLASSES NAME PRECISION IMAGES CHANNELS ACTIVATION
serving := WORKERS PORT MANAGEMENT_PORT METRICS_PORT GRPC GRPC_INFERENCE_PORT GRPC_MANAGEMENT_PORT
variables-run := $(packing) $(serving)
variables-archive := $(packing)
variables-start := MODELS FOREGROUND $(serving)
variables-image := MODELS TAG BASE TARGET
variables-scale := WORKERS MODEL
variables-classify := IMAGE IMAGES MODEL FORMAT OUTPUT TOPK THRESHOLD
variables-classify-batch := IMAGES OUTPUT ARCHIVE COLUMN TOPK THRESHOLD EMBEDDING ACTORS ADDRESS
variables-evaluate := IMAGES MODEL LABELS MIN_PRECISION
variables-gateway := MODEL UPSTREAMS HOST HTTP_PORT HTTPS_PORT KEYS CERTIFICATE CERTIFICATE_KEY ACME \
	RATE BURST CONNECTIONS PROXIES PREFIX KEEPALIVE TIMEOUT LOG FOREGROUND
variables-upgrade := ARCHIVE AGREEMENT
variables-test := TEST_OPTIONS
variables-test-slow := TEST_OPTIONS
variables-test-all := TEST_OPTIONS
everywhere := PYTHON TORCH_INDEX SHELL MAKEFLAGS

goals := $(or $(MAKECMDGOALS),help)
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(foreach name,$(given),$(eval export GIVEN_$(name) = $$(value $(name))))
export GIVEN_TO := make $(goals)
foreign := $(filter-out $(everywhere) $(foreach goal,$(goals),$(variables-$(goal))),$(given))
lists := $(foreach list,$(filter variables-%,$(.VARIABLES)),'$(list:variables-%=%) $($(list))')

.PHONY: help variables setup run test test-slow test-all fuzz chaos bench archive start stop status gateway gateway-reload gateway-stop upgrade rollback scale classify evaluate digits shapes lint format lock lock-check clean image classify-batch

help: variables
	@awk -F ':.*## ' 'BEGIN { print "make and one or more of these:" } /^##@/ { print "\n" substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 } \
		/^#:/ { text = text "\n" substr($$0, 3) } END { print text }' $(firstword $(MAKEFILE_LIST))

variables:
	@$(if $(foreign),$(PYTHON) scripts/variables.py '$(goals)' '$(foreign)' $(lists),:)

##@ Serve
run: setup ## do everything: weights, archive, server, and a first answer
	@$(VENV_PYTHON) -m scripts.run

status: setup ## show workers, memory, queue and versions
	@$(VENV_PYTHON) -m scripts.serve.commands status

scale: setup ## change the number of workers: make scale WORKERS=2
	@$(VENV_PYTHON) -m scripts.serve.commands scale

stop: setup ## stop the server
	@$(VENV_PYTHON) -m scripts.serve.commands stop

##@ Classify
classify: setup ## classify pictures: make classify IMAGE=cat.jpg, or IMAGES=folder OUTPUT=all.csv
	@$(VENV_PYTHON) -m scripts.classify

classify-batch: setup-batch ## millions of pictures, with Ray: make classify-batch IMAGES=folder OUTPUT=folder
	@$(VENV_PYTHON) -m batch

evaluate: setup ## how good a served model is: make evaluate IMAGES=folder-by-class
	@$(VENV_PYTHON) -m scripts.evaluate

##@ Own models
# Beside other work a thread that waits for its neighbours must not spin: on two busy cores that cost
# training five times as much of the processor.
digits: setup ## a model of one's own, from training to serving, about a minute
	@OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m examples.digits

shapes: setup ## a model that gives several labels a picture, likewise, about two minutes
	@OMP_WAIT_POLICY=passive $(VENV_PYTHON) -m examples.shapes

archive: setup ## build an archive, with trained weights only
	@$(VENV_PYTHON) -m scripts.build.commands

##@ Production
start: setup ## serve archives, with trained weights only
	@$(VENV_PYTHON) -m scripts.serve.commands start

image: setup ## an image of an archive, built with docker or podman
	@$(VENV_PYTHON) -m scripts.container.image

gateway: setup ## nginx in front of the server, or of UPSTREAMS: HTTPS, API keys, limits, retries
	@$(VENV_PYTHON) -m scripts.gateway.commands start

gateway-reload: setup ## apply changed API keys and certificates to the gateway
	@$(VENV_PYTHON) -m scripts.gateway.commands reload

gateway-stop: setup ## stop the gateway after it has answered what is in flight
	@$(VENV_PYTHON) -m scripts.gateway.commands stop

upgrade: setup ## serve another archive with zero downtime: make upgrade ARCHIVE=file
	@$(VENV_PYTHON) -m scripts.gateway.commands upgrade

rollback: setup ## serve the archive that the last upgrade replaced
	@$(VENV_PYTHON) -m scripts.gateway.commands rollback

##@ Tests
# Unit tests run on all cores; the others share servers, ports and a browser.
UNIT := tests/unit --numprocesses logical --maxprocesses 4
test: setup-tests ## test against a real TorchServe, and in a browser, about 8 minutes
	@$(VENV_PYTHON) -m pytest $(UNIT) -m "not slow"
	@$(VENV_PYTHON) -m pytest --ignore=tests/unit -m "not slow" --require-integration $(TEST_OPTIONS)

test-slow: setup-all ## run the rest: chaos, costs, training, containers, Ray, all documents
	@$(VENV_PYTHON) -m pytest $(UNIT) -m slow
	@$(VENV_PYTHON) -m pytest --ignore=tests/unit -m slow $(TEST_OPTIONS)

test-all: test test-slow ## run both

fuzz: setup-tests ## corrupted pictures, by the thousand
	@$(VENV_PYTHON) -m tests.stress.fuzz

chaos: setup-tests ## five minutes of bad clients and killed workers
	@$(VENV_PYTHON) -m tests.stress.chaos

##@ Benchmarks
bench: setup-benchmarks ## compare with other servers, about 40 minutes; bench-NAME for the others
	@$(VENV_PYTHON) -m benchmarks compare

# bench-engines, bench-settings and so on; .venv/bin/python -m benchmarks lists them.
bench-%: setup-benchmarks
	@$(VENV_PYTHON) -m benchmarks $*

##@ Maintenance
setup: variables ## make .venv; setup-all, -batch, -benchmarks, -huggingface, ...
	@$(PYTHON) scripts/bootstrap.py run

# What each of these installs in addition to what running needs; all is for make lint and make test-slow.
groups-all := tests precision batch timm lite0 huggingface
groups-batch := batch
groups-benchmarks := tests precision batch timm lite0 huggingface benchmarks
groups-huggingface := huggingface
groups-lite0 := timm lite0
groups-precision := precision
groups-tests := tests timm lite0 huggingface
groups-timm := timm
SETUPS := $(patsubst groups-%,setup-%,$(filter groups-%,$(.VARIABLES)))
.PHONY: $(SETUPS)
$(SETUPS): setup-%: variables
	@$(PYTHON) scripts/bootstrap.py run $(groups-$*)

lint: setup-all ## check style and types
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-cache --no-logo
	@.venv/bin/vermin --target=3.10- --no-tips --quiet batch client handler scripts benchmarks examples tests deploy
	@.venv/bin/vermin --target=3.6- --eval-annotations --no-tips --quiet scripts/bootstrap.py

format: setup-tests ## put the code into the common style
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

# Running, testing and the groups of TOGETHER are resolved as one, so that one gives way to the other;
# the benchmarks give way to all. What the run group pins is left out of the other locks, which only
# stand on it. Each image has a lock that stands alone, with the versions of all others.
PIN := .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--generate-hashes --no-header --no-annotate
RUNNING := requirements/run.in client/pyproject.toml
TOGETHER := tests precision timm lite0 huggingface batch
lock: setup ## pin all packages again, from requirements/*.in and the client's needs
	@$(PIN) $(RUNNING) $(TOGETHER:%=requirements/%.in) -o .venv/pins.txt >/dev/null
	@$(PIN) -c .venv/pins.txt $(RUNNING) -o requirements/run.lock >/dev/null
	@pinned=$$(sed -nE 's/^([a-z0-9.-]+)==.*/--no-emit-package=\1/p' requirements/run.lock | sort -u); \
	for group in $(TOGETHER) benchmarks; do \
		$(PIN) $$pinned -c .venv/pins.txt requirements/$$group.in -o requirements/$$group.lock >/dev/null || exit; \
	done
	@for group in container gateway ray; do \
		$(PIN) -c .venv/pins.txt requirements/$$group.in -o requirements/$$group.lock >/dev/null || exit; \
	done
	@for group in clients moto sbom; do \
		$(PIN) requirements/$$group.in -o requirements/$$group.lock >/dev/null || exit; \
	done

lock-check: setup ## whether the locks can be installed on each Python and platform, a minute
	@$(VENV_PYTHON) -m tests.locks

clean: variables ## stop gateway and server, remove all that was built; .venv stays
	@if [ -x $(VENV_PYTHON) ]; then \
		$(VENV_PYTHON) -m scripts.gateway.commands stop && $(VENV_PYTHON) -m scripts.serve.commands stop; fi
	@rm -rf build .run .mypy_cache .ruff_cache .pytest_cache .hypothesis model_store/*.mar
