#!/bin/sh
# The night's chain: preprocess --append, then export behind its gate.
#
#   nightly.sh            both stages
#   nightly.sh preprocess | nightly.sh export      one of them, for a scheduler that has a task each
#
# crontab beside it has the line for cron. In its environment:
#   SOURCE=idx:/data/incoming     as in preprocess --source; what is new in it is appended
#   DATA_DIR=/data/shards         the data set; the first night makes it
#   MODEL_DIR=/data/run/export    the model
#   OUTPUT_DIR=/data/embeddings   the export; each of the three may be a URL
#   REQUIRE='elbo>-110'           the gate, as in export --require; without it there is none
#   PREPROCESS_FLAGS='--name=mnist --num_shards=4'    further flags, separated by spaces
#   EXPORT_FLAGS='--split=train,test'
#   TRIES=3                   how often a stage is started that ends with 75
#   PYTHON=/opt/vae-pipeline/.venv/bin/python
#
# Exit status: 0 published, or nothing was new; 1 a stage failed; 2 bad usage or configuration;
# 3 the gate held the export back, and what was published before stays; 75 interrupted, or
# another night is still under way: start it again, it goes on from the files that are whole.
set -u

say() { echo "nightly: $*" >&2; }

need() { # name and value of a variable, and an example
  [ -n "$2" ] && return
  say "$1='': expected a value, such as $3; set it in the environment, see the head of $0"
  exit 2
}

need SOURCE "${SOURCE:-}" idx:/data/incoming
need DATA_DIR "${DATA_DIR:-}" /data/shards
need MODEL_DIR "${MODEL_DIR:-}" /data/run/export
need OUTPUT_DIR "${OUTPUT_DIR:-}" /data/embeddings
python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
  say "PYTHON=$python: no such program; expected the Python of an environment with vae-pipeline"
  exit 2
fi
num_tries=${TRIES:-3}
case $num_tries in
*[!0-9]* | '' | 0)
  say "TRIES=$num_tries: expected a number from 1; set it in the environment"
  exit 2
  ;;
esac
[ $# -gt 0 ] || set -- preprocess export
for stage; do
  case $stage in
  preprocess | export) ;;
  *)
    say "$stage: no such stage; expected preprocess, export, or nothing for both"
    exit 2
    ;;
  esac
done

# One night of a user at a time for each export; nights of two users are kept apart by the locks of
# their directories. The stages inherit the lock: as long as one of them runs, even if this script
# was killed, no other night begins.
if ! [ -w "${TMPDIR:-/tmp}" ]; then
  say "TMPDIR=${TMPDIR:-/tmp}: expected a directory to write to"
  exit 2
fi
lock=${TMPDIR:-/tmp}/vae-nightly-$(id -u)-$(printf %s "$OUTPUT_DIR" | cksum | tr -d ' ').lock
if ! (: >> "$lock") 2> /dev/null; then # In a shell of its own, which a failure ends.
  say "$lock: cannot be opened; expected a file of user $(id -u): remove it, or set TMPDIR"
  exit 1
fi
exec 9>> "$lock"
if ! flock -n 9; then
  say "$OUTPUT_DIR: another night is still under way (it holds $lock); start it again later"
  exit 75
fi

work=$(mktemp -d) || exit 1
child='' told_to_stop=''
# A scheduler tells this script alone, and the stage is who can stop well.
stop() {
  told_to_stop=yes
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null
}
trap stop TERM INT
trap 'rm -rf "$work"' EXIT

# Runs a command, shows and keeps what it says on standard error; sets `status`.
run() {
  rm -f "$work/pipe"
  mkfifo "$work/pipe"
  # A signal to the whole process group is not for tee: the stage has yet to say that it stops, and
  # would fail for want of a reader.
  (trap '' TERM INT && exec tee "$work/said" < "$work/pipe" >&2) &
  tee=$!
  "$@" 2> "$work/pipe" &
  child=$!
  [ -z "$told_to_stop" ] || kill -TERM "$child" # It came before there was a child to tell.
  wait "$child"
  status=$?
  while kill -0 "$child" 2> /dev/null; do # A signal has ended the wait, and not the child.
    wait "$child"
    status=$?
  done
  child=''
  wait "$tee"
}

# Runs a stage until it ends with another status than 75; sets `status`.
run_stage() {
  stage=$1
  shift
  try=1
  while
    run "$python" -m "pipeline.$stage" "$@"
    # 143: a signal that came before the program listened to any.
    [ "$status" -eq 75 ] || [ "$status" -eq 143 ]
  do
    if [ -n "$told_to_stop" ] || [ "$try" -ge "$num_tries" ]; then
      say "$stage was interrupted in try $try of $num_tries; run the same command to go on"
      exit 75
    fi
    try=$((try + 1))
    say "$stage was interrupted; try $try of $num_tries"
  done
}

# Ends the night unless the stage ended with 0.
expect_0() {
  [ "$status" -eq 0 ] && return
  say "$stage failed with status $status; its lines above say why"
  [ "$status" -eq 2 ] && exit 2
  exit 1
}

# Sets `status`: 0 if a finished data set is there, 4 if none is; it may be a URL.
look_for_set() {
  run "$python" -c '
import os, sys
from pipeline.cli import command
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files
def look():
    if not files.exists(files.join(os.path.expanduser(sys.argv[1]), manifest_lib.MANIFEST)):
        raise SystemExit(4)
sys.exit(command.end("nightly", look))' "$DATA_DIR"
}

preprocess() {
  # shellcheck disable=SC2086 # Flags, separated by spaces.
  set -- --source="$SOURCE" --output_dir="$DATA_DIR" ${PREPROCESS_FLAGS:-}
  look_for_set
  case $status in
  0) set -- "$@" --append ;;
  4) ;; # The first night, or one that goes on with it, makes the set.
  143)
    say "preprocess was interrupted before it began; run the same command to go on"
    exit 75
    ;;
  *) # Not to be taken for a first night: that would be told to --overwrite the set.
    say "$DATA_DIR: cannot tell whether the data set is there; the lines above say why"
    exit 1
    ;;
  esac
  run_stage preprocess "$@"
  unfinished='holds (an unfinished --append|unfinished output) of other inputs'
  if [ "$status" -eq 1 ] && grep -qE "$unfinished" "$work/said"; then
    say "$SOURCE has changed since a night that did not end; what that one had begun is undone"
    run_stage preprocess "$@" --overwrite
  fi
  expect_0
}

embed() {
  # shellcheck disable=SC2086 # Flags, separated by spaces.
  run_stage export --data_dir="$DATA_DIR" --model_dir="$MODEL_DIR" --output_dir="$OUTPUT_DIR" \
    ${REQUIRE:+--require="$REQUIRE"} ${EXPORT_FLAGS:-}
  if [ "$status" -eq 1 ] && grep -q '^export: --require: ' "$work/said"; then
    say "the gate held the export back; nothing is published, $OUTPUT_DIR stays as it was"
    exit 3
  fi
  expect_0
}

for stage; do
  case $stage in
  preprocess) preprocess ;;
  export) embed ;;
  esac
done
