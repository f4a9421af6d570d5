#!/usr/bin/env bash
# `make demo`: the sanity pipeline on the model and the preference pairs that come with Tandem. The same model, served
# on this machine, is the judge. Needs no key, no GPU and no Hub.
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

export HF_HUB_OFFLINE=1
MODEL_NAME=${XDG_CACHE_HOME:-$HOME/.cache}/tandem/SmolLM2-135M-Instruct
python -m tandem.demo "$MODEL_NAME"
export MODEL_NAME JUDGE_MODEL=$MODEL_NAME JUDGE_BASE_URL=local
DATASET=$(python -c 'from tandem.data.sample import sample_path; print(sample_path("train").parent)')
export DATASET OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/runs/demo}
exec "$ROOT/pipelines/dpo_pipeline_sanity.sh"
