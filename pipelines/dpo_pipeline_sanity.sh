#!/usr/bin/env bash
# The whole pipeline on a small slice of data: check → SFT → merge → DPO → merge → evaluate → compare → judge → report.
#
#   MODEL_NAME=HuggingFaceTB/SmolLM2-135M-Instruct ./pipelines/dpo_pipeline_sanity.sh
#
# MODEL_NAME         model folder or Hub name (required)
# DATASET            preference pairs: file, folder, Hub name, or .yaml of sources with their splits (default: the
#                    recipe's data.yaml, else a small slice of Anthropic/hh-rlhf)
# SFT_DATASET        other data for the SFT stage, which also takes conversations, questions with answers, and texts
# VAL_RATIO          share of the training prompts to hold out (default: 0.25 for data without a test split, else 0)
# OUTPUT_DIR         run folder (runs/dpo_sanity)
# ACCELERATE_CONFIG  hardware (accelerate_configs/cpu.yaml)
# RECIPE             folder with sft.yaml and dpo.yaml, and files for other stages (pipelines/recipes/sanity)
# JUDGE_MODEL        model that judges (default: none; the report says "not judged")
# JUDGE_BASE_URL     the judge's server: an OpenAI-compatible URL, or `local` to serve JUDGE_MODEL on this machine. The
#                    key is read from OPENAI_API_KEY.
# CHAT_TEMPLATE      Jinja file to use in place of the model's chat template. CHAT_TEMPLATE_KWARGS (JSON) are variables
#                    for it, and SYSTEM_PROMPT (keep, fold, drop) says what becomes of system messages. The trained model
#                    is saved with all three.
# MOUNT_DIR          folder on another disk to which checkpoints, models and logs are mirrored
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ -n ${MODEL_NAME:-} ]] || die "MODEL_NAME is required: a model folder or Hub name"
no_credentials MODEL_NAME DATASET SFT_DATASET JUDGE_MODEL JUDGE_BASE_URL
RUN=${OUTPUT_DIR:-$ROOT/runs/dpo_sanity}
RECIPE=${RECIPE:-$ROOT/pipelines/recipes/sanity}
[[ -n ${DATASET:-} || ! -f $RECIPE/data.yaml ]] || DATASET=$RECIPE/data.yaml
if [[ -z ${DATASET:-} ]]; then
  data=(--dataset_name Anthropic/hh-rlhf --dataset_train_split 'train[:256]')
  [[ ${VAL_RATIO:-0} != 0 ]] || data+=(--dataset_test_split 'test[:128]')
else
  data=(--dataset_name "$DATASET")
  if [[ -z ${VAL_RATIO:-} ]]; then
    ratio=$(python -m tandem.launch.held_out "$DATASET")
    read -r VAL_RATIO VAL_RATIO_OF <<<"$ratio"
    without="$DATASET has no test split"
    [[ -z $VAL_RATIO_OF ]] || without="sources of $DATASET have no test split"
    [[ $VAL_RATIO == 0 ]] || HELD_OUT="$without: --val_ratio $VAL_RATIO (VAL_RATIO chooses another)"
    export VAL_RATIO VAL_RATIO_OF HELD_OUT # for the second start of this script, by log_to
  fi
fi
[[ ${VAL_RATIO:-0} == 0 ]] || data+=(--val_ratio "$VAL_RATIO")
[[ ${VAL_RATIO:-0} == 0 || -z ${VAL_RATIO_OF:-} ]] || data+=(--val_ratio_of "$VAL_RATIO_OF")
sft_data=("${data[@]}")
[[ -z ${SFT_DATASET:-} ]] || sft_data=(--dataset_name "$SFT_DATASET")
template=() # for the base model only: what is trained from it gets all of this into its own template
[[ -z ${CHAT_TEMPLATE:-} ]] || template+=(--chat_template "$CHAT_TEMPLATE")
[[ -z ${CHAT_TEMPLATE_KWARGS:-} ]] || template+=(--chat_template_kwargs "$CHAT_TEMPLATE_KWARGS")
[[ -z ${SYSTEM_PROMPT:-} ]] || template+=(--system_prompt "$SYSTEM_PROMPT")
mount=()
[[ -z ${MOUNT_DIR:-} ]] || mount=(--mount_dir "$MOUNT_DIR")

stages() {
  stage check data_report.json \
    python "$ROOT/scripts/check_data.py" --config "$(config check)" "${data[@]}" --tokenizer_name_or_path "$MODEL_NAME" \
    --report "$RUN/data_report.json" "${template[@]}"
  stage sft sft \
    launch "$ROOT/scripts/sft.py" --config "$(config sft)" "${sft_data[@]}" --model_name_or_path "$MODEL_NAME" \
    --output_dir "$RUN/sft" "${mount[@]}" "${template[@]}"
  stage merge_sft sft_dpo_init_merged \
    python "$ROOT/scripts/merge_lora.py" --adapter "$RUN/sft" --output_dir "$RUN/sft_dpo_init_merged"
  stage dpo dpo \
    launch "$ROOT/scripts/dpo.py" --config "$(config dpo)" "${data[@]}" \
    --model_name_or_path "$RUN/sft_dpo_init_merged" --output_dir "$RUN/dpo" "${mount[@]}"
  stage merge_dpo dpo_sanity_merged \
    python "$ROOT/scripts/merge_lora.py" --adapter "$RUN/dpo" --output_dir "$RUN/dpo_sanity_merged"
  stage evaluate results.json \
    python "$ROOT/scripts/evaluate.py" --config "$(config evaluate)" "${data[@]}" --reference_model "$MODEL_NAME" \
    --sft_model "$RUN/sft_dpo_init_merged" --dpo_model "$RUN/dpo_sanity_merged" --output_file "$RUN/results.json" \
    "${template[@]}"
  stage compare dpo_comparison_results.json \
    python "$ROOT/scripts/compare.py" --config "$(config compare)" "${data[@]}" --base_model "$MODEL_NAME" \
    --sft_model "$RUN/sft_dpo_init_merged" --finetuned_model "$RUN/dpo_sanity_merged" --output_dir "$RUN" \
    "${template[@]}"
  if [[ -n ${JUDGE_MODEL:-} ]]; then
    judge=(python "$ROOT/scripts/judge.py" --config "$(config judge)" "${data[@]}" --run_dir "$RUN"
      --judge_model "$JUDGE_MODEL")
    if [[ ${JUDGE_BASE_URL:-} == local ]]; then
      judge=(with_local_judge "${judge[@]}" --base_url "http://127.0.0.1:$JUDGE_PORT/v1")
    elif [[ -n ${JUDGE_BASE_URL:-} ]]; then
      judge+=(--base_url "$JUDGE_BASE_URL")
    fi
    stage judge judge_summary.json "${judge[@]}"
  fi
  stage report report.html \
    python "$ROOT/scripts/report.py" --run_dir "$RUN"
}

preflight stages
log_to "$RUN/dpo_pipeline_sanity.log"
[[ -n ${DATASET:-} ]] || echo "DATASET is not set: using the first 256 training and 128 test pairs of Anthropic/hh-rlhf"
[[ -z ${HELD_OUT:-} ]] || echo "$HELD_OUT"
stages
echo "Report: $RUN/report.html"
