#!/bin/sh
# The nightly job: preprocess --append and export, each behind its gate; then `latest` names the
# export.
#
#   nightly.sh            both stages
#   nightly.sh preprocess | nightly.sh export      one stage, for a scheduler with a task for each
#
# The file crontab in this folder has the line for cron. Environment variables:
#   SOURCE=idx:/data/incoming     as in preprocess --source; its new records are appended
#   DATA_DIR=/data/shards         the data set; the first night creates it
#   MODEL_DIR=/data/run/export    the model
#   EXPORTS_DIR=/data/embeddings  the exports, one directory a night: dt=2026-11-25; each of these
#                                 three may be a URL
#   LATEST=/data/embeddings/latest    names the newest export that the gate let through; by default
#                                 in EXPORTS_DIR
#   DATE=2026-11-25               the night, also for a try after midnight; by default today
#   KEEP=7                        how many good exports stay
#   REQUIRE='elbo>-110'           the gate of the export, as in export --require; optional
#   REQUIRE_DATA='min_class_share>=0.02'    the gate of the data set, as in preprocess --require;
#                                 optional
#   REFERENCE_DATA=/data/shards   a data set with which new records are compared, as in preprocess
#                                 --reference; may be DATA_DIR; optional
#   PREPROCESS_FLAGS='--name=photos --num_shards=4'    further flags, separated by spaces
#   EXPORT_FLAGS='--split=train,test'
#   METRICS_DIR=/var/lib/node_exporter/textfile    each command writes a file night_STAGE.prom for
#                                 Prometheus there, as in --metrics_file; optional
#   TRIES=3                   how many times a stage is started while it ends with 75
#   PYTHON=/opt/vae-pipeline/.venv/bin/python
#
# Exit status: 0 published, or nothing was new; 1 a stage failed; 2 bad usage or configuration;
# 3 a gate rejected the data set or the export, as the last line says, and LATEST names the export
# before; 75 interrupted, or another night is still under way: start it again, and it resumes from
# its completed files.
set -u

say() { echo "nightly: $*" >&2; }

need() { # name and value of a variable, and an example
  [ -n "$2" ] && return
  say "$1='': expected a value, such as $3; set it in the environment, see the comment at the top of $0"
  exit 2
}

need SOURCE "${SOURCE:-}" idx:/data/incoming
need DATA_DIR "${DATA_DIR:-}" /data/shards
need MODEL_DIR "${MODEL_DIR:-}" /data/run/export
need EXPORTS_DIR "${EXPORTS_DIR:-}" /data/embeddings
latest=${LATEST:-$EXPORTS_DIR/latest}
date=${DATE:-$(date +%F)}
case $date in
[0-9][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]) ;;
*)
  say "DATE=$date: expected a date such as 2026-11-25; set it in the environment"
  exit 2
  ;;
esac
python=${PYTHON:-python3}
if ! command -v "$python" > /dev/null; then
  say "PYTHON=$python: no such program; expected the Python of an environment with vae-pipeline"
  exit 2
fi
num_tries=${TRIES:-3} keep=${KEEP:-7}
for setting in "TRIES=$num_tries" "KEEP=$keep"; do
  case ${setting#*=} in
  *[!0-9]* | '' | 0)
    say "$setting: expected a number from 1; set it in the environment"
    exit 2
    ;;
  esac
done
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

# The lock lets one night run at a time for each user and LATEST; nights of two users are kept apart
# by the locks of their directories. The stages inherit this lock: while a stage runs, no other
# night begins, even if this script was killed.
if ! [ -w "${TMPDIR:-/tmp}" ]; then
  say "TMPDIR=${TMPDIR:-/tmp}: expected a directory to write to"
  exit 2
fi
lock=${TMPDIR:-/tmp}/vae-nightly-$(id -u)-$(printf %s "$latest" | cksum | tr -d ' ').lock
if ! (: >> "$lock") 2> /dev/null; then # In a subshell, because a failed redirection ends the shell.
  say "$lock: cannot be opened; expected a file of user $(id -u): remove it, or set TMPDIR"
  exit 1
fi
exec 9>> "$lock"
if ! flock -n 9; then
  say "$latest: another night is still under way (it holds $lock); start this one again later"
  exit 75
fi

child='' is_stopping=''
# A scheduler may signal this script alone; the stage is the process that has to stop.
stop() {
  is_stopping=yes
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null
}
trap stop TERM INT

# Runs a command; sets `status`.
run() {
  "$@" &
  child=$!
  [ -z "$is_stopping" ] || kill -TERM "$child" # The signal came before `child` was set.
  wait "$child"
  status=$?
  while kill -0 "$child" 2> /dev/null; do # A signal ended the wait while the child still runs.
    wait "$child"
    status=$?
  done
  child=''
}

# Runs a command of pipeline, with the file of its metrics; sets `status`.
run_command() {
  command=$1
  shift
  run "$python" -m "pipeline.$command" "$@" \
    ${METRICS_DIR:+--metrics_file="$METRICS_DIR/night_$command.prom"}
}

# Runs a stage, again while it ends with 75; sets `status`.
run_stage() {
  stage=$1
  shift
  try=1
  while
    run_command "$stage" "$@"
    # 143: SIGTERM came before the program had installed its handler.
    [ "$status" -eq 75 ] || [ "$status" -eq 143 ]
  do
    if [ -n "$is_stopping" ] || [ "$try" -ge "$num_tries" ]; then
      say "$stage was interrupted in try $try of $num_tries; run the same command to resume"
      exit 75
    fi
    try=$((try + 1))
    say "$stage was interrupted; try $try of $num_tries"
  done
}

# Ends the night unless `status` is 0.
expect_0() {
  [ "$status" -eq 0 ] && return
  say "$stage failed with status $status; see its messages above"
  [ "$status" -eq 2 ] && exit 2
  exit 1
}

# Sets `status`: 0 if DATA_DIR, a path or a URL, holds a finished data set; 4 if it holds none.
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
  set -- --source="$SOURCE" --output_dir="$DATA_DIR" ${REQUIRE_DATA:+--require="$REQUIRE_DATA"} \
    --status_on_rejection=3 ${PREPROCESS_FLAGS:-}
  reference=${REFERENCE_DATA:-} outcome="nothing was added to $DATA_DIR"
  look_for_set
  case $status in
  # A record that comes again with another image stays as it is, with a warning, and new ones get in.
  0) set -- --on_changed=keep "$@" --append ;;
  4) # The first night creates the data set, or resumes creating it.
    [ "${reference%/}" != "${DATA_DIR%/}" ] || reference=''
    outcome="no command trains or exports from $DATA_DIR"
    ;;
  143)
    say "preprocess was interrupted before it began; run the same command to resume"
    exit 75
    ;;
  *) # This is not a first night: without --append, preprocess would ask for --overwrite.
    say "$DATA_DIR: cannot tell whether it holds a data set; see the messages above"
    exit 1
    ;;
  esac
  set -- "$@" ${reference:+--reference="$reference"}
  # Status 4: an unfinished run with other inputs is in the way.
  run_stage preprocess "$@" --status_on_conflict=4
  if [ "$status" -eq 4 ]; then
    say "$SOURCE has changed since a night that did not end; its partial work is removed"
    run_stage preprocess "$@" --overwrite
  fi
  if [ "$status" -eq 3 ]; then
    say "the gate rejected the data set: $outcome, and this night exports nothing; to judge the data \
set by another REQUIRE_DATA, start this night again with DATE=$date"
    exit 3
  fi
  expect_0
}

embed() {
  # A night may have an export already: of other data or by another model, finished or begun; of a
  # shard that was repaired since; or rejected by a bound that REQUIRE no longer has. Status 4 says
  # so. The next one gets a number.
  for suffix in '' .2 .3 .4 .5 .6 .7 .8 .9; do
    # shellcheck disable=SC2086 # Flags, separated by spaces.
    run_stage export --data_dir="$DATA_DIR" --model_dir="$MODEL_DIR" \
      --output_dir="$EXPORTS_DIR/dt=$date$suffix" --latest="$latest" \
      ${REQUIRE:+--require="$REQUIRE"} --status_on_rejection=3 --status_on_conflict=4 \
      ${EXPORT_FLAGS:-}
    [ "$status" -eq 4 ] || break
  done
  if [ "$status" -eq 3 ]; then
    say "the gate rejected the export; $latest stays where it is; to judge it by another REQUIRE, \
start this night again with DATE=$date"
    exit 3
  fi
  expect_0
  run_command latest "$latest" --keep="$keep" --of="$EXPORTS_DIR"
  if [ "$status" -ne 0 ]; then
    say "the export is published, but old ones could not be removed; see the messages above"
    exit 1
  fi
}

for stage; do
  case $stage in
  preprocess) preprocess ;;
  export) embed ;;
  esac
done
