#!/usr/bin/env bash
# The full run on Anthropic/hh-rlhf: trains on all 160,800 training pairs, evaluates and judges on held-out ones.
#
#   MODEL_NAME=google/gemma-3-1b-pt RECIPE=pipelines/recipes/gemma3_1b ACCELERATE_CONFIG=accelerate_configs/fsdp.yaml \
#   JUDGE_MODEL=… ./pipelines/hh_rlhf.sh
#
# The variables are those of dpo_pipeline_sanity.sh; RECIPE is required here.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ -n ${MODEL_NAME:-} ]] || die "MODEL_NAME is required: a model folder or Hub name"
[[ -n ${RECIPE:-} ]] || die "RECIPE is required: a folder of pipelines/recipes"
export DATASET=${DATASET:-Anthropic/hh-rlhf} OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/runs/hh_rlhf}
exec "$ROOT/pipelines/dpo_pipeline_sanity.sh"
