# Everything is a command here. `make` alone says what there is.
#
# Variables, all optional, as in `make run WORKERS=2 PORT=9080`:
#   ARCH=resnet50      another of torchvision's classifiers than densenet121
#   WEIGHTS=file       weights of your own instead of torchvision's
#   CLASSES=file       your own classes, a name a line, or JSON
#   NAME=name          of the archive and of the model; otherwise the architecture's
#   RESIZE, CROP, MEAN, STD, INTERPOLATION
#                      other preprocessing than torchvision's
#   MODELS="a b"       make start: which archives, side by side
#   MODEL=name         which of several models
#   WEIGHTS_URL=url    a mirror of torchvision's file
#   WORKERS=n          worker processes; otherwise as many as suit the machine
#   PORT=n             predictions; likewise MANAGEMENT_PORT, METRICS_PORT,
#                      GRPC_INFERENCE_PORT, GRPC_MANAGEMENT_PORT
#   ENGINE=torch       make archive: serve with PyTorch (GPU) instead of ONNX Runtime
#   IMAGES="a b*.jpg"  make classify: files, folders, patterns; FORMAT, OUTPUT, TOPK, THRESHOLD
#                      make evaluate: a folder with a folder of pictures a class
#   NODES=n            make gateway: TorchServe nodes of its own; HOST, HTTP_PORT, HTTPS_PORT, KEYS,
#                      CERTIFICATE, CERTIFICATE_KEY, RATE, BURST, CONNECTIONS: see deploy/README.md
#   NODE=name          make drain, undrain, replace: which node
#   ARCHIVE=file       make upgrade: the new archive; AGREEMENT=share of samples that must stay
#   TORCH_INDEX=url    take torch from this package index, such as PyTorch's CPU-only one
#   PYTHON=python3.12  the Python to make the virtual environment with
#   TEST_OPTIONS=...   make test: options for pytest, such as --require-browser

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

# $(call option,NAME,VALUE): --NAME VALUE, or nothing where there is no value.
option = $(if $(2),--$(1) '$(2)')

WEIGHTS_OPTIONS = $(call option,weights,$(WEIGHTS)) $(call option,url,$(WEIGHTS_URL)) \
	$(call option,arch,$(ARCH)) $(call option,classes,$(CLASSES)) $(call option,name,$(NAME))
PREPROCESSING_OPTIONS = $(call option,resize,$(RESIZE)) $(call option,crop,$(CROP)) \
	$(call option,mean,$(MEAN)) $(call option,std,$(STD)) \
	$(call option,interpolation,$(INTERPOLATION))
SERVER_OPTIONS = $(call option,workers,$(WORKERS)) $(call option,port,$(PORT)) \
	$(call option,management-port,$(MANAGEMENT_PORT)) \
	$(call option,metrics-port,$(METRICS_PORT)) \
	$(call option,grpc-inference-port,$(GRPC_INFERENCE_PORT)) \
	$(call option,grpc-management-port,$(GRPC_MANAGEMENT_PORT))
GATEWAY_OPTIONS = $(call option,model,$(MODEL)) $(call option,nodes,$(NODES)) $(call option,workers,$(WORKERS)) \
	$(call option,host,$(HOST)) $(call option,http-port,$(HTTP_PORT)) \
	$(call option,https-port,$(HTTPS_PORT)) $(call option,keys,$(KEYS)) \
	$(call option,certificate,$(CERTIFICATE)) \
	$(call option,certificate-key,$(CERTIFICATE_KEY)) \
	$(call option,rate,$(RATE)) $(call option,burst,$(BURST)) \
	$(call option,connections,$(CONNECTIONS))

.PHONY: help setup setup-tests setup-benchmarks run test test-unit fuzz chaos flood soak outages bench bench-engines bench-pipe bench-scaling bench-gpu gateway-cost archive start stop status gateway gateway-stop gateway-status drain undrain replace upgrade scale classify evaluate digits lint format lock lock-check clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## make the virtual environment and install the pinned packages
	@$(PYTHON) scripts/bootstrap.py run

setup-tests: ## the same, and the tools of tests and checks
	@$(PYTHON) scripts/bootstrap.py run tests

setup-benchmarks: ## the same, and what the benchmarks compare with
	@$(PYTHON) scripts/bootstrap.py run benchmarks

run: setup ## do everything: weights, archive, server, and a first answer
	@$(VENV_PYTHON) -m scripts.run $(WEIGHTS_OPTIONS) $(PREPROCESSING_OPTIONS) $(SERVER_OPTIONS)

test: setup-tests ## run all tests, those against a real TorchServe and in a browser too
	@$(VENV_PYTHON) -m pytest --require-integration $(TEST_OPTIONS)

test-unit: setup-tests ## run the tests that need no server
	@$(VENV_PYTHON) -m pytest tests/unit

fuzz: setup-tests ## corrupted pictures, by the thousand
	@$(VENV_PYTHON) -m tests.stress.fuzz

chaos: setup-tests ## five minutes of bad clients and killed workers
	@$(VENV_PYTHON) -m tests.stress.chaos

flood: setup-tests ## 200 uploads of 19 MB at once
	@$(VENV_PYTHON) -m tests.stress.load flood

soak: setup-tests ## 5,000 requests of mixed sizes
	@$(VENV_PYTHON) -m tests.stress.load soak

bench: setup-benchmarks ## compare with other servers, about 10 minutes
	@$(VENV_PYTHON) -m benchmarks.bench

bench-engines: setup-benchmarks ## compare engines and their options, about 20 minutes
	@$(VENV_PYTHON) -m benchmarks.engines

bench-pipe: setup-benchmarks ## what each setting of the server is worth, about 10 minutes
	@$(VENV_PYTHON) -m benchmarks.pipe

bench-scaling: setup-benchmarks ## more workers, larger pictures, about 5 minutes
	@$(VENV_PYTHON) -m benchmarks.scaling

bench-gpu: setup-benchmarks ## the PyTorch engine on a GPU, if there is one
	@$(VENV_PYTHON) -m benchmarks.gpu

gateway-cost: setup-tests ## what the gateway costs, and what two nodes give
	@$(VENV_PYTHON) -m tests.stress.gateway_cost

outages: setup-tests ## ten minutes of clients while workers and nodes die and are replaced
	@$(VENV_PYTHON) -m tests.stress.outages

archive: setup ## production: build an archive, with trained weights only
	@$(VENV_PYTHON) -m scripts.archive $(WEIGHTS_OPTIONS) $(PREPROCESSING_OPTIONS) \
		$(call option,engine,$(ENGINE))

start: setup ## production: serve archives, with trained weights only
	@$(VENV_PYTHON) -m scripts.server start $(call option,models,$(MODELS)) $(SERVER_OPTIONS)

stop: setup ## stop the server
	@$(VENV_PYTHON) -m scripts.server stop

status: setup ## show workers, queue and versions
	@$(VENV_PYTHON) -m scripts.server status

scale: setup ## change the number of workers: make scale WORKERS=2
	@$(VENV_PYTHON) -m scripts.server scale $(call option,workers,$(WORKERS)) \
		$(call option,model,$(MODEL))

gateway: setup ## nginx before the server of make run, or before NODES=2 of its own
	@$(VENV_PYTHON) -m scripts.cluster start $(GATEWAY_OPTIONS)

gateway-stop: setup ## stop the gateway and its nodes
	@$(VENV_PYTHON) -m scripts.cluster stop

gateway-status: setup ## show the nodes behind the gateway
	@$(VENV_PYTHON) -m scripts.cluster status

drain: setup ## take a node out without losing a request: make drain NODE=node-1
	@$(VENV_PYTHON) -m scripts.cluster drain $(call option,node,$(NODE))

undrain: setup ## let a drained node serve again
	@$(VENV_PYTHON) -m scripts.cluster undrain $(call option,node,$(NODE))

replace: setup ## put a new node in the place of one, dead or alive
	@$(VENV_PYTHON) -m scripts.cluster replace $(call option,node,$(NODE))

upgrade: setup ## serve the new archive instead of the old one, without a gap
	@$(VENV_PYTHON) -m scripts.upgrade $(call option,archive,$(ARCHIVE)) \
		$(call option,agreement,$(AGREEMENT))

classify: setup ## classify pictures: make classify IMAGE=cat.jpg, or IMAGES=folder OUTPUT=all.csv
	@$(VENV_PYTHON) -m scripts.classify $(if $(IMAGE),'$(IMAGE)') $(IMAGES) \
		$(call option,model,$(MODEL)) $(call option,format,$(FORMAT)) \
		$(call option,output,$(OUTPUT)) $(call option,topk,$(TOPK)) \
		$(call option,threshold,$(THRESHOLD))

evaluate: setup ## how good a served model is: make evaluate IMAGES=folder-by-class
	@$(VENV_PYTHON) -m scripts.evaluate $(if $(IMAGES),'$(IMAGES)') $(call option,model,$(MODEL))

digits: setup ## a model of one's own, from training to serving, about a minute
	@$(VENV_PYTHON) -m examples.digits

lint: setup-tests ## check style and types
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/vermin --target=3.10- --no-tips --quiet handler scripts examples tests deploy
	@.venv/bin/vermin --target=3.6- --eval-annotations --no-tips --quiet scripts/bootstrap.py

format: setup-tests ## put the code into the common style
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

# Running and testing are resolved together, so that one gives way to the other; the benchmarks give
# way to both. What the run group pins is left out of the other two locks, which only stand on it.
PIN := .venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--generate-hashes --no-header --no-annotate
lock: setup ## pin all packages anew, from the three requirements.in
	@$(PIN) requirements.in tests/requirements.in -o .venv/pins.txt >/dev/null
	@$(PIN) -c .venv/pins.txt requirements.in -o requirements.lock
	@pinned=$$(sed -nE 's/^([a-z0-9.-]+)==.*/--no-emit-package=\1/p' requirements.lock | sort -u); \
	for group in tests benchmarks; do \
		$(PIN) $$pinned -c .venv/pins.txt $$group/requirements.in -o $$group/requirements.lock || exit; \
	done

lock-check: setup ## whether the locks can be installed on each Python and platform, a minute
	@$(VENV_PYTHON) -m tests.locks

clean: ## stop the server and remove all that was built; .venv stays
	@if [ -x $(VENV_PYTHON) ]; then $(VENV_PYTHON) -m scripts.server stop; fi
	@rm -rf build .run .mypy_cache .ruff_cache .pytest_cache .hypothesis model_store/*.mar
