#!/usr/bin/env bash
# Prints the device of this host, for `make`: gaudi, cuda or cpu, and how many there are.
set -Eeuo pipefail

count() { printf '%s\n' "$1" | grep -c . || true; }

if compgen -G '/dev/accel/accel[0-9]*' >/dev/null; then
  echo "gaudi $(count "$(compgen -G '/dev/accel/accel[0-9]*')")"
elif command -v hl-smi >/dev/null; then
  echo "gaudi $(count "$(hl-smi -Q index -f csv,noheader 2>/dev/null)")"
elif gpus=$(nvidia-smi -L 2>/dev/null | grep '^GPU') && [[ -n $gpus ]]; then
  echo "cuda $(count "$gpus")"
else
  echo "cpu 1"
fi
