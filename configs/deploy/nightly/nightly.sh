#!/bin/bash
# The nightly chain: new images into the data set, their embeddings, and the gate.
#
#   SOURCE=folder:/data/images DATA_DIR=/data/shards MODEL_DIR=/data/run/export \
#     OUTPUT_DIR=/data/embeddings REQUIRE="elbo>-110" nightly.sh [preprocess] [export]
#
# Both stages, unless it says which. Exit status: 0 done, or nothing to do; 75 interrupted, start it
# again and it goes on; 1 a stage has failed, or the gate is not passed and the last export stays;
# 2 bad usage. A stage that ends with 75 by itself is started again, TRIES times in all.
set -u
: "${SOURCE:?expected an image set as --source takes it}"
: "${DATA_DIR:?expected the directory of the data set}"
: "${MODEL_DIR:?expected a published model, WORKDIR/export of the trainer}"
: "${OUTPUT_DIR:?expected the directory of the export}"
PYTHON=${PYTHON:-python3} TRIES=${TRIES:-3}
# Further flags, as words: --name=set --validation_fraction=0
read -ra of_preprocess <<< "${PREPROCESS_FLAGS:-}"
read -ra of_export <<< "${EXPORT_FLAGS:-}"
[ $# -gt 0 ] || set -- preprocess export

process=
stopped=
trap 'stopped=yes; [ -z "$process" ] || kill -TERM "$process" 2> /dev/null' TERM INT

# Runs a module of Python to its end; the status is its own.
run() {
  "$PYTHON" -m "$@" &
  process=$!
  wait "$process"
  local status=$?
  while kill -0 "$process" 2> /dev/null; do # A signal has ended the wait, and not the process.
    wait "$process"
    status=$?
  done
  process=
  return "$status"
}

stage() {
  case $1 in
    preprocess)
      local flags=(--source="$SOURCE" --output_dir="$DATA_DIR" "${of_preprocess[@]}")
      # There is nothing to append to on the first night. Later ones undo what another night has
      # left unfinished: the source may have grown since.
      local there='import sys; from pipeline.storage import exists, join
sys.exit(not exists(join(sys.argv[1], "manifest.json")))'
      "$PYTHON" -c "$there" "$DATA_DIR" && flags+=(--append --overwrite)
      run pipeline.preprocess "${flags[@]}"
      ;;
    export)
      run pipeline.export --data_dir="$DATA_DIR" --model_dir="$MODEL_DIR" \
        --output_dir="$OUTPUT_DIR" ${REQUIRE:+--require="$REQUIRE"} "${of_export[@]}"
      ;;
    *)
      echo "nightly: $1: no such stage; expected preprocess or export" >&2
      return 2
      ;;
  esac
}

for name in "$@"; do
  for ((try = 1; ; try++)); do
    stage "$name"
    status=$?
    # Whatever a stage that was told to stop has said: the rest is for the next start.
    [ -z "$stopped" ] || status=75
    [ "$status" -eq 75 ] && [ -z "$stopped" ] && [ "$try" -lt "$TRIES" ] || break
  done
  if [ "$status" -ne 0 ]; then
    echo "nightly: $name ended with status $status" >&2
    exit "$status"
  fi
done
