# vae-pipeline: every target works from a fresh clone; `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup preprocess verify train evaluate export report demo week demo-gs fake-gcs-server pod-security test test-long fuzz test-flink test-spark runners java-and-mvn lint lock audit sbom bench bench-gpu check-gpu clean promtool

# A value as one word of the shell, whatever is in it.
quote = '$(subst ','\'',$(1))'

PYTHON ?= python3
VENV ?= .venv
PY := $(call quote,$(VENV)/bin/python)
# Extras of setup.py beside dev; CUDA's libraries where the driver shows a GPU.
EXTRAS ?= $(if $(wildcard /dev/nvidia[0-9]*),cuda)
comma := ,
INSTALLED := $(VENV)/.installed$(addprefix -,$(EXTRAS))

# What the three stages take; see `make help`. Each reaches the shell as one word, but FLAGS, which
# are many.
SOURCE ?= sample
NAME ?=
CONFIG ?= configs/mnist.py
SPLIT ?= test
DEMO_DIR ?= demo
DATA_DIR ?= $(DEMO_DIR)/shards
WORKDIR ?= $(DEMO_DIR)/run
MODEL_DIR ?= $(WORKDIR)/export
FLAGS ?=
# The newest Flink 1.19 there is: of the versions that Beam 2.77 drives, the one whose runner can be
# had in parts from Maven Central. tests/engines/flink.pom.xml names the runner.
FLINK_VERSION ?= 1.19.3
FLINK_READY := build/flink/ready
SPARK_READY := build/spark/ready
# An engine listens on 127.0.0.1, but Beam's job server on every address, and it runs what it is sent. So
# a cluster gets a network of its own, with nothing in it but the loopback, where the system allows.
ALONE = $(shell unshare --map-root-user --net ip link set lo up 2> /dev/null && echo "unshare --map-root-user --net sh -c 'ip link set lo up && exec \"\$$0\" \"\$$@\"'")
# Beam's own runner for one machine, written in Go; the same version as the SDK.
PRISM_VERSION ?= v2.77.0
PRISM := build/prism/prism
# Beam's program that starts Python workers in a container, of the same version.
BOOT := build/boot/container
PROMTOOL_VERSION ?= v0.305.0
# Versions of Python with a file in locks/.
PYTHONS := 3.10 3.11 3.12 3.13
# In an environment of their own: they have no say in what the stages are installed with.
AUDIT_TOOLS := pip-audit==2.10.1 cyclonedx-bom==7.5.0 uv==0.13.9
AUDIT_READY := build/audit/.ready
AUDIT_BIN := build/audit/bin
# On Python 3.10, tensorflow-metadata allows no protobuf without this hole; see SECURITY.md.
AUDIT_IGNORED := --ignore-vuln=CVE-2026-0994
# Most of a test's time is imports and small models, which leave a second core idle.
JOBS ?= 2

help:  ## lists the targets and their variables
	@echo "First steps:"
	@sed -nE 's/^([a-z-]+):.* ### (.*)/  \1\t\2/p' $(call quote,$(firstword $(MAKEFILE_LIST))) | expand -t 18
	@echo "Other targets:"
	@sed -nE 's/^([a-z-]+):.* ## (.*)/  \1\t\2/p' $(call quote,$(firstword $(MAKEFILE_LIST))) | expand -t 18
	@echo "Variables, with their defaults:"
	@echo "  PYTHON="$(call quote,$(PYTHON))" VENV="$(call quote,$(VENV))"                 the interpreter and the environment it makes"
	@echo "  EXTRAS="$(call quote,$(EXTRAS))"                                 setup: extras of setup.py, such as cuda"
	@echo "  SOURCE="$(call quote,$(SOURCE))" NAME=NAME OUTPUT_DIR=DIR   preprocess: image set, its name if not the source's, where shards go"
	@echo "  DATA_DIR=DIR                            verify"
	@echo "  DATA_DIR=DIR CONFIG="$(call quote,$(CONFIG))" WORKDIR=DIR  train"
	@echo "  DATA_DIR=DIR MODEL_DIR=DIR OUTPUT_DIR=DIR SPLIT="$(call quote,$(SPLIT))"  export, report"
	@echo "  SOURCE="$(call quote,$(SOURCE))"                           week"
	@echo "  DATA_DIR=DIR MODEL_DIR=DIR SPLIT="$(call quote,$(SPLIT))"            evaluate"
	@echo "  JOBS="$(call quote,$(JOBS))"                                  test"
	@echo "  FLAGS=\"...\"                              any further flags of a stage, Beam's included"
	@echo "  DEMO_DIR="$(call quote,$(DEMO_DIR))"                            where the demo and the defaults above write"
	@echo "Example: make preprocess SOURCE=idx:/data/mnist OUTPUT_DIR=/data/shards FLAGS=\"--num_shards=32\""

setup: $(INSTALLED)  ## makes VENV and installs everything into it

$(INSTALLED): setup.py constraints.txt pyproject.toml
	$(call quote,$(PYTHON)) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 14) else f"Python {v[0]}.{v[1]}: expected 3.10 to 3.13; set PYTHON=")'
	$(call quote,$(PYTHON)) -m venv $(call quote,$(VENV))
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable $(call quote,.[dev$(addprefix $(comma),$(EXTRAS))])
	$(PY) -m pip check
	@touch $@

demo: $(INSTALLED)  ### the whole path on the embedded digits, in minutes
	@$(MAKE) --no-print-directory preprocess OUTPUT_DIR= $(call quote,DATA_DIR=$(DEMO_DIR)/shards) SOURCE=sample NAME=mnist FLAGS=--num_shards=4
	@$(MAKE) --no-print-directory train $(call quote,DATA_DIR=$(DEMO_DIR)/shards) $(call quote,WORKDIR=$(DEMO_DIR)/run) CONFIG=configs/mnist.py FLAGS="--config.num_epochs=12 --config.batch_size=128"
	@$(MAKE) --no-print-directory export $(call quote,DATA_DIR=$(DEMO_DIR)/shards) $(call quote,MODEL_DIR=$(DEMO_DIR)/run/export) $(call quote,OUTPUT_DIR=$(DEMO_DIR)/embeddings) SPLIT=test FLAGS=
	@echo
	@echo "Look at:"
	@echo "  "$(call quote,$(DEMO_DIR))"/embeddings/report.html                                    all of it at a glance, in a browser"
	@echo "  "$(call quote,$(DEMO_DIR))"/embeddings/images/mnist-test-00000-of-00004.png           digits above their reconstructions"
	@echo "  "$(call quote,$(DEMO_DIR))"/embeddings/embeddings/mnist-test-00000-of-00004.parquet   their embeddings, a row a digit"
	@echo "  "$(call quote,$(DEMO_DIR))"/run/metrics.jsonl                                         losses after each epoch"
	@echo "  "$(call quote,$(VENV))"/bin/tensorboard --logdir "$(call quote,$(DEMO_DIR))"/run/tensorboard"

preprocess: $(INSTALLED)  ### image set -> TFRecord shards
	@$(PY) -m pipeline.preprocess --source=$(call quote,$(SOURCE))$(if $(NAME), --name=$(call quote,$(NAME))) --output_dir=$(call quote,$(or $(OUTPUT_DIR),$(DATA_DIR))) $(FLAGS)

verify: $(INSTALLED)  ## reads a data set back and names every fault
	@$(PY) -m pipeline.verify $(call quote,$(DATA_DIR))

train: $(INSTALLED)  ### shards -> model
	@$(PY) -m trainer.main --config=$(call quote,$(CONFIG)) --config.data_dir=$(call quote,$(DATA_DIR)) --workdir=$(call quote,$(WORKDIR)) $(FLAGS)

evaluate: $(INSTALLED)  ## shards and model -> log-likelihood, ELBO, active units
	@$(PY) -m trainer.evaluate --data_dir=$(call quote,$(DATA_DIR)) --model_dir=$(call quote,$(MODEL_DIR)) --split=$(call quote,$(SPLIT)) $(FLAGS)

export: $(INSTALLED)  ### shards and model -> embeddings, pictures, report.html
	@$(PY) -m pipeline.export --data_dir=$(call quote,$(DATA_DIR)) --model_dir=$(call quote,$(MODEL_DIR)) --split=$(call quote,$(SPLIT)) --output_dir=$(call quote,$(or $(OUTPUT_DIR),$(DEMO_DIR)/embeddings)) $(FLAGS)

report: $(INSTALLED)  ## makes the report of an export again
	@$(PY) -m pipeline.report --data_dir=$(call quote,$(DATA_DIR)) --model_dir=$(call quote,$(MODEL_DIR)) --split=$(call quote,$(SPLIT)) --output_dir=$(call quote,$(or $(OUTPUT_DIR),$(DEMO_DIR)/embeddings)) $(FLAGS)

# A shard per split and batches of 128: the embedded set is small.
week: $(INSTALLED)  ## nine nightly exports with a kill, a damaged shard, a new model, a gate
	@$(PY) -m tests.week --source=$(call quote,$(SOURCE)) --workdir=$(call quote,$(DEMO_DIR)/week)

# FLAGS=--fail_every=9 lets every ninth request fail.
demo-gs: fake-gcs-server  ## the demo with every directory on gs://, of a store on this machine
	@$(PY) -m tests.storage.object_stores $(FLAGS) $(MAKE) --no-print-directory demo DEMO_DIR=gs://bucket/demo FLAGS=

fake-gcs-server: $(VENV)/bin/fake-gcs-server  ## the object store of the tests of gs://; needs Go

$(VENV)/bin/fake-gcs-server: | $(INSTALLED)
	GOBIN=$(call quote,$(abspath $(VENV)/bin)) go install github.com/fsouza/fake-gcs-server@v1.56.1

pod-security: $(VENV)/bin/pod-security  ## Kubernetes' own rules for pods, for the tests of manifests; needs Go

POD_SECURITY := tests/deploy/pod_security
$(VENV)/bin/pod-security: $(wildcard $(POD_SECURITY)/*) | $(INSTALLED)
	go build -C $(POD_SECURITY) -o $(call quote,$(abspath $(VENV)/bin)/)

promtool: $(VENV)/bin/promtool  ## what checks the alerts of configs/deploy, in minutes; needs Go

# A module of its own, since `go install` refuses the replacements in that of Prometheus.
$(VENV)/bin/promtool: | $(INSTALLED)
	rm -rf build/promtool && mkdir -p build/promtool
	cd build/promtool && go mod init promtool && go get github.com/prometheus/prometheus/cmd/promtool@$(PROMTOOL_VERSION)
	cd build/promtool && go build -o $(call quote,$(abspath $(VENV)/bin/promtool)) github.com/prometheus/prometheus/cmd/promtool

test: $(INSTALLED)  ### runs all tests, in JOBS processes
	$(PY) -m pytest --numprocesses=$(call quote,$(JOBS)) --dist=loadfile

test-long: $(INSTALLED) $(if $(shell command -v go),$(PRISM) $(BOOT))  ## runs the tests marked long: more kills, more workers
	$(PY) -m pytest -m long

fuzz: $(INSTALLED)  ## reads damaged input for two minutes a reader
	@for reader in idx npz npz_member npy csv image parquet tfrecord manifest; do $(PY) -m tests.faults.fuzz $$reader 120 || exit 1; done

test-flink: $(INSTALLED) $(FLINK_READY) $(PRISM)  ## runs the Beam stages on Flink and on Prism; needs Java 11 or 17, mvn, go
	$(ALONE) $(PY) -m pytest -m flink

test-spark: $(INSTALLED) $(SPARK_READY)  ## runs the Beam stages on Spark; needs Java 11 or 17, mvn
	$(ALONE) $(PY) -m pytest -m spark

runners: $(INSTALLED) $(FLINK_READY) $(SPARK_READY) $(PRISM)  ## times the Beam stages on each runner and compares their bytes
	@$(ALONE) $(PY) -m tests.benchmarks.bench_runners --source=$(call quote,$(SOURCE))

# Not into $(VENV): it has no say in what the stages are installed with.
$(FLINK_READY): tests/engines/flink.pom.xml | $(INSTALLED) java-and-mvn
	rm -rf build/flink
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target build/flink apache-flink-libraries==$(FLINK_VERSION)
	mvn --quiet --batch-mode --file tests/engines/flink.pom.xml dependency:copy-dependencies -DoutputDirectory=$(call quote,$(CURDIR)/build/flink/job-server)
	@touch $@

$(SPARK_READY): tests/engines/spark.pom.xml | java-and-mvn
	rm -rf build/spark
	mvn --quiet --batch-mode --file tests/engines/spark.pom.xml dependency:copy-dependencies -DoutputDirectory=$(call quote,$(CURDIR)/build/spark/jars)
	@touch $@

java-and-mvn:
	@command -v java > /dev/null && command -v mvn > /dev/null || { echo "expected java and mvn; apt-get install default-jre-headless maven"; exit 1; }

$(PRISM):
	@command -v go > /dev/null || { echo "expected go 1.26 or newer"; exit 1; }
	GOBIN=$(call quote,$(CURDIR)/$(@D)) go install github.com/apache/beam/sdks/v2/go/cmd/prism@$(PRISM_VERSION)

$(BOOT):
	@command -v go > /dev/null || { echo "expected go 1.26 or newer"; exit 1; }
	GOBIN=$(call quote,$(CURDIR)/$(@D)) go install github.com/apache/beam/sdks/v2/python/container@$(PRISM_VERSION)

lint: $(INSTALLED)  ## ruff: check and format; mypy: the types of pyproject.toml
	$(call quote,$(VENV)/bin/ruff) check .
	$(call quote,$(VENV)/bin/ruff) format --check .
	$(PY) -m mypy

lock: $(AUDIT_READY)  ## pins and hashes of what setup.py needs, as constraints.txt has them
	@for version in $(PYTHONS); do \
	  $(AUDIT_BIN)/uv pip compile --quiet setup.py --constraint constraints.txt --generate-hashes \
	    --no-annotate --python-version $$version --python-platform linux \
	    --custom-compile-command "make lock" --output-file locks/python$$version.txt || exit 1; \
	done

# A package that the service does not know is a failure, too (--strict).
audit: $(AUDIT_READY)  ## looks for known holes in what constraints.txt and locks/ pin; needs pypi.org
	@for file in constraints.txt $(PYTHONS:%=locks/python%.txt); do \
	  echo $$file; \
	  $(AUDIT_BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner=off $(AUDIT_IGNORED) \
	    --requirement $$file || exit 1; \
	done

sbom: $(INSTALLED) $(AUDIT_READY)  ## build/sbom/: what locks/ installs, as CycloneDX documents
	@mkdir -p build/sbom
	@printf '[project]\nname = "%s"\nversion = "%s"\n' $$($(PY) -W ignore setup.py --name --version) > build/sbom/pyproject.toml
	@for version in $(PYTHONS); do \
	  $(AUDIT_BIN)/cyclonedx-py requirements locks/python$$version.txt --output-reproducible \
	    --pyproject build/sbom/pyproject.toml --output-file build/sbom/python$$version.cdx.json || exit 1; \
	done

$(AUDIT_READY):
	rm -rf $(@D)
	$(call quote,$(PYTHON)) -m venv $(@D)
	$(AUDIT_BIN)/python -m pip install --quiet --disable-pip-version-check $(AUDIT_TOOLS)
	@touch $@

bench: $(INSTALLED)  ## times the stages against plain loops over the same work, and the KL routes
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_preprocess
	@$(PY) -m tests.benchmarks.bench_sources
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_sync
	@$(PY) -m tests.benchmarks.bench_append
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_train
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_export
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_reuse
	@$(PY) -m trainer.compare_routes

bench-gpu: $(INSTALLED)  ## times training on a GPU; fails where there is none
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.bench_gpu $(FLAGS)

check-gpu: $(INSTALLED)  ## runs the checks of docs/gpu.md on this machine's GPUs
	@TF_CPP_MIN_LOG_LEVEL=3 $(PY) -m tests.benchmarks.check_gpu $(FLAGS)

clean:  ## removes what these targets made, VENV included
	rm -rf $(call quote,$(VENV)) $(call quote,$(DEMO_DIR)) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
