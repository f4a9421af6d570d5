#!/usr/bin/env bash
# `make demo-rounds`: two rounds of a small model on instructions that code can check. Needs no key, no GPU and no Hub.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export HF_HUB_OFFLINE=1 OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/runs/demo_rounds}
MODEL_NAME=${XDG_CACHE_HOME:-$HOME/.cache}/tandem/SmolLM2-135M-Instruct
python -m tandem.demo "$MODEL_NAME"
PROMPTS=${XDG_CACHE_HOME:-$HOME/.cache}/tandem/instructions
python -m tandem.rounds.instructions "$PROMPTS"
export MODEL_NAME PROMPTS VAL_RATIO=0
# Answers are ranked by the share of constraints that they keep; the second scorer counts those that keep all
export SCORER=function:tandem.rounds.instructions:share SECOND_SCORER=function:tandem.rounds.instructions:success
export RECIPE=${RECIPE:-$ROOT/pipelines/recipes/demo_rounds}
exec "$ROOT/pipelines/rounds.sh"
