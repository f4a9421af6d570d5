# Functions that the pipelines share. This file is sourced, never run.
# shellcheck shell=bash
set -Eeuo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$ROOT/.venv/bin:$PATH"
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$ROOT/accelerate_configs/cpu.yaml}
JUDGE_PORT=${JUDGE_PORT:-18123} # fixed: the address is part of the keys of the judge's verdicts
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-5} TOKENIZERS_PARALLELISM=false

die() {
  echo "UserError: $1" >&2
  exit 2
}

# no_credentials VARIABLE…: refuse addresses with a user, a password or a query, which would show in files and in the
# list of processes.
no_credentials() {
  local name
  for name in "$@"; do
    [[ ! ${!name:-} =~ ://([^/]*@|.*\?) ]] ||
      die "$name holds a user, a password or a query: they would show in files and process lists; put keys into HF_TOKEN and OPENAI_API_KEY"
  done
}

# log_to FILE: from here on, all output goes to FILE as well as to the screen, and SIGTERM to all processes of this script.
# It starts the script a second time, under tandem.launch.supervise.
log_to() {
  if [[ ${TANDEM_LOG:-} == "$1" ]]; then
    trap 'TERMINATED=1' TERM # the stage's programs get SIGTERM too: the script waits until they have saved
    return
  fi
  export TANDEM_LOG=$1
  mkdir -p "$(dirname "$1")"
  exec python -m tandem.launch.supervise --log "$1" "$0"
}

# preflight STAGES: check the command lines of all stages in the function STAGES before the first of them runs.
preflight() {
  [[ -z ${TANDEM_LOG:-} ]] || return 0 # done before log_to started the script a second time
  PREFLIGHT=1 "$1" | python -m tandem.launch.preflight "$ACCELERATE_CONFIG"
}

# stage NAME OUTPUT COMMAND…: run COMMAND, which leaves OUTPUT in the run folder $RUN, unless it was done before with the
# same settings. After a stage that runs, all later stages run anew. A stage that was stopped resumes where it was.
stage() {
  local name=$1 output=$2 status=0 stamp seconds=$SECONDS
  if [[ -n ${PREFLIGHT:-} ]]; then
    printf '%s\0' "$#" "$@"
    return
  fi
  [[ -z ${TERMINATED:-} ]] || stop "$name" 75
  shift 2
  stamp=$RUN/.stages/$name
  mkdir -p "$RUN/.stages"
  if [[ -f $stamp && -e $RUN/$output && -z ${UPSTREAM:-} ]]; then
    printf '%s\0' "$@" | python -m tandem.launch.stamp check "$ROOT" "$RUN" "$name" "$output" || exit $?
    echo "== $name: done before ($RUN/$output)"
    # The stage that ran last: a kill may have come before the stages after it ran anew
    [[ $(cat "$RUN/.stages/.last" 2>/dev/null || true) != "$name" ]] || UPSTREAM=$name
    return
  fi
  if [[ -f $stamp && -e $RUN/$output ]]; then
    echo "== $name: $UPSTREAM ran again, so $RUN/$output is made anew"
    # Remove its mirror too, or the stage would restore the old output from there
    if [[ -n ${MOUNT_DIR:-} ]] && cmp -s "$RUN/$output/run.json" "$MOUNT_DIR/$output/run.json"; then
      # run.json last, so that a mirror that a kill left half removed is still known as this run's
      find "${MOUNT_DIR:?}/$output" -mindepth 1 ! -path "$MOUNT_DIR/$output/run.json" -delete
      rm -rf "${MOUNT_DIR:?}/$output"
    fi
    rm -rf "${RUN:?}/$output"
  fi
  rm -f "$stamp"
  echo "$name" >"$RUN/.stages/.ran" && mv "$RUN/.stages/.ran" "$RUN/.stages/.last"
  echo "== $name"
  # For the report, which shows how to repeat the run: the command and the variables of `launch` and `with_local_judge`
  printf '%q ' "RUN=$RUN" "ACCELERATE_CONFIG=$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+"NUM_PROCESSES=$NUM_PROCESSES"} ${JUDGE_MODEL:+"JUDGE_MODEL=$JUDGE_MODEL"} "$@" \
    >"$RUN/.stages/$name.command"
  # Written now and not at the end, since somebody may edit the stage's config while it runs
  printf '%s\0' "$@" | python -m tandem.launch.stamp begin "$ROOT" "$RUN" "$name" "$output" || status=$?
  ((status != 0)) || "$@" || status=$?
  ((status == 0)) || stop "$name" "$status"
  [[ -e $RUN/$output ]] || stop "$name" 1
  mv "$stamp.begun" "$stamp"
  UPSTREAM=$name
  echo "== $name: $((SECONDS - seconds)) s"
}

stop() {
  local name=$1 status=$2 why="failed"
  # After SIGTERM a stage that failed counts as preempted, unless it says 2 or 3: every stage can go on after a kill
  [[ -z ${TERMINATED:-} || $status == [23] ]] || status=75
  case $status in
    2) why="was given wrong input" ;;
    3) why="was stopped by an alarm: see $RUN/$name/logs/alarms.jsonl" ;;
    75) why="was preempted" ;;
  esac
  echo "== $name $why (exit code $status). Log: $TANDEM_LOG. The same command goes on from here." >&2
  exit "$status"
}

# config STAGE: the recipe's config for a stage, else the default one.
config() {
  if [[ -f $RECIPE/$1.yaml ]]; then echo "$RECIPE/$1.yaml"; else echo "$ROOT/pipelines/recipes/default/$1.yaml"; fi
}

# launch SCRIPT ARGUMENT…: run a training script under accelerate, and return the script's own exit code. NUM_PROCESSES
# overrides the accelerate config's number.
launch() {
  python -m tandem.launch --config_file "$ACCELERATE_CONFIG" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} "$@"
}

# with_local_judge COMMAND…: run COMMAND while transformers serves $JUDGE_MODEL on loopback.
with_local_judge() {
  local server status=0 waited=0
  # Otherwise the server that has the port would be asked, while this one fails to start
  if (exec 3<>"/dev/tcp/127.0.0.1/$JUDGE_PORT") 2>/dev/null; then
    die "port $JUDGE_PORT of the local judge is taken: set another JUDGE_PORT"
  fi
  # Under the variables that Tandem's own processes have: threads that wait sleep, and leave the cores to others
  python -c "import os, sys, tandem; os.execvp(sys.argv[1], sys.argv[1:])" \
    transformers serve "$JUDGE_MODEL" --host 127.0.0.1 --port "$JUDGE_PORT" >"$RUN/judge_server.log" 2>&1 &
  server=$!
  # shellcheck disable=SC2064  # the process id is to be expanded now
  trap "kill $server 2>/dev/null || true" EXIT
  until python -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=2)" \
    "http://127.0.0.1:$JUDGE_PORT/health" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || die "the local judge did not start: see $RUN/judge_server.log"
    ((++waited < 120)) || die "the local judge gave no sign in two minutes: see $RUN/judge_server.log"
    sleep 1
  done
  "$@" || status=$?
  kill "$server" && wait "$server" 2>/dev/null || true
  trap - EXIT
  return "$status"
}
