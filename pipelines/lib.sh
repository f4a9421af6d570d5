# What the pipelines share; sourced, never run.
# shellcheck shell=bash
set -Eeuo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$ROOT/.venv/bin:$PATH"
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$ROOT/accelerate_configs/cpu.yaml}
JUDGE_PORT=${JUDGE_PORT:-18123} # part of the judge's cache keys, so it is fixed
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-5} TOKENIZERS_PARALLELISM=false

die() {
  echo "UserError: $1" >&2
  exit 2
}

# no_credentials VARIABLE…: refuse addresses with a user, a password or a query: they would go into files, and be seen in
# the list of processes.
no_credentials() {
  local name
  for name in "$@"; do
    [[ ! ${!name:-} =~ ://([^/]*@|.*\?) ]] ||
      die "$name holds a user, a password or a query: they would show in files and process lists; put keys into HF_TOKEN and OPENAI_API_KEY"
  done
}

# log_to FILE: from here on, everything on screen goes to FILE as well, and SIGTERM to all that this script has started.
log_to() {
  if [[ ${TANDEM_LOG:-} == "$1" ]]; then
    trap 'TERMINATED=1' TERM # the stage's programs get it too: what they save is waited for
    return
  fi
  export TANDEM_LOG=$1
  mkdir -p "$(dirname "$1")"
  exec python -m tandem.launch.supervise --log "$1" "$0"
}

# preflight STAGES: have the command lines of all stages of the function STAGES checked before the first of them runs.
preflight() {
  [[ -z ${TANDEM_LOG:-} ]] || return 0 # log_to starts the script a second time
  PREFLIGHT=1 "$1" | python -m tandem.launch.preflight "$ACCELERATE_CONFIG"
}

# stage NAME OUTPUT COMMAND…: run COMMAND, which leaves OUTPUT in the run folder $RUN, unless it has done so before.
# A stage that runs makes the later ones run anew; one that was stopped goes on from what it has saved.
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
    # The last that ran: a kill may have come before the stages after it were made anew
    [[ $(cat "$RUN/.stages/.last" 2>/dev/null || true) != "$name" ]] || UPSTREAM=$name
    return
  fi
  if [[ -f $stamp && -e $RUN/$output ]]; then
    echo "== $name: $UPSTREAM ran again, so $RUN/$output is made anew"
    # Its mirror too: else what is made anew would be brought back as it was
    if [[ -n ${MOUNT_DIR:-} ]] && cmp -s "$RUN/$output/run.json" "$MOUNT_DIR/$output/run.json"; then
      # run.json last: cut off by a kill, it is still known as this run's
      find "${MOUNT_DIR:?}/$output" -mindepth 1 ! -path "$MOUNT_DIR/$output/run.json" -delete
      rm -rf "${MOUNT_DIR:?}/$output"
    fi
    rm -rf "${RUN:?}/$output"
  fi
  rm -f "$stamp"
  echo "$name" >"$RUN/.stages/.ran" && mv "$RUN/.stages/.ran" "$RUN/.stages/.last"
  echo "== $name"
  # What the report tells a reader to repeat, with all that `launch` and `with_local_judge` look at
  printf '%q ' "RUN=$RUN" "ACCELERATE_CONFIG=$ACCELERATE_CONFIG" \
    ${NUM_PROCESSES:+"NUM_PROCESSES=$NUM_PROCESSES"} ${JUDGE_MODEL:+"JUDGE_MODEL=$JUDGE_MODEL"} "$@" \
    >"$RUN/.stages/$name.command"
  # Of now, not of when it ends: its config may be edited meanwhile
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
  # A program that SIGTERM ended has saved what it could, as each stage can be killed at any moment
  [[ -z ${TERMINATED:-} || $status == [23] ]] || status=75
  case $status in
    2) why="was given wrong input" ;;
    3) why="was stopped by an alarm: see $RUN/$name/logs/alarms.jsonl" ;;
    75) why="was preempted" ;;
  esac
  echo "== $name $why (exit code $status). Log: $TANDEM_LOG. The same command goes on from here." >&2
  exit "$status"
}

# config STAGE: the recipe's file for a stage, or the default one.
config() {
  if [[ -f $RECIPE/$1.yaml ]]; then echo "$RECIPE/$1.yaml"; else echo "$ROOT/pipelines/recipes/default/$1.yaml"; fi
}

# launch SCRIPT ARGUMENT…: a training script under accelerate, with its own exit code. NUM_PROCESSES overrides the config's.
launch() {
  python -m tandem.launch --config_file "$ACCELERATE_CONFIG" ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} "$@"
}

# with_local_judge COMMAND…: run COMMAND while transformers serves $JUDGE_MODEL on loopback.
with_local_judge() {
  local server status=0 waited=0
  # Else another server would be asked, while this one fails to start
  if (exec 3<>"/dev/tcp/127.0.0.1/$JUDGE_PORT") 2>/dev/null; then
    die "port $JUDGE_PORT of the local judge is taken: set another JUDGE_PORT"
  fi
  transformers serve "$JUDGE_MODEL" --host 127.0.0.1 --port "$JUDGE_PORT" >"$RUN/judge_server.log" 2>&1 &
  server=$!
  # shellcheck disable=SC2064  # the server's number of now
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
