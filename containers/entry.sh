#!/usr/bin/env bash
# Runs in the container: the given command, else a shell, which without a terminal reads commands from standard input.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -w runs ]]; then
  echo "UserError: runs/ is not writable for user $(id -u): give the folder to that user, or set HOST_UID to its owner" >&2
  exit 2
fi
# Check that this user may read the host's files: safetensors, for one, writes files that only their owner may read
for name in MODEL_NAME DATASET RECIPE ACCELERATE_CONFIG; do
  [[ ${!name:-} == /mnt/* ]] || continue
  closed=$(find "${!name}" ! -readable -print -quit)
  if [[ -n $closed ]]; then
    echo "UserError: $name: $closed is not readable for user $(id -u): chmod a+rX it on the host, or set HOST_UID to its owner" >&2
    exit 2
  fi
done
if (($# == 0)); then
  if [[ -n ${MODEL_NAME:-} ]]; then
    echo "Tandem in $PWD. Type: ./pipelines/dpo_pipeline_sanity.sh (MODEL_NAME=$MODEL_NAME)" >&2
  else
    echo "Tandem in $PWD. Type: MODEL_NAME=google/gemma-3-270m ./pipelines/dpo_pipeline_sanity.sh" >&2
  fi
  set -- bash
  if [[ -t 0 ]]; then
    set -- env PS1='tandem:\w\$ ' bash --norc -i
  fi
fi
# bash would not pass SIGTERM on
exec python -m tandem.launch.supervise "$@"
