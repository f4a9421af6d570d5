#!/usr/bin/env bash
# Rounds of DPO on the policy's own answers: sample → score → pairs → DPO, each measured on held-out prompts.
#
#   MODEL_NAME=… PROMPTS=prompts.jsonl SCORER=function:check.py:score ./pipelines/rounds.sh
#
# MODEL_NAME         model folder or Hub name of round 0 (required)
# PROMPTS            any data set that Tandem reads, with or without answers (required)
# SCORER             scores and ranks answers: reward:MODEL, judge:MODEL or function:FILE.py:NAME (required)
# SECOND_SCORER      scores too, without ranking, and shows whether SCORER is over-optimised; at most one of the two may
#                    be a judge
# ROUNDS             2
# REFERENCE          DPO's reference: previous, the policy that the round starts from, or initial, MODEL_NAME (previous)
# VAL_RATIO          share of the prompts to hold out (0.2; 0: read the test split)
# OFFLINE_PAIRS      preference pairs of a data set to mix in; those on held-out prompts are left out
# OFFLINE_SHARE      their share of the pairs of each round (0.5)
# JUDGE_BASE_URL     server of a judge; its key is read from OPENAI_API_KEY
# RECIPE             folder with dpo.yaml, sample.yaml, held_out.yaml, score.yaml, make_pairs.yaml, rounds.yaml (recipes/rounds)
# OUTPUT_DIR, MOUNT_DIR, ACCELERATE_CONFIG, NUM_PROCESSES  as in dpo_pipeline_sanity.sh
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

for name in MODEL_NAME PROMPTS SCORER; do [[ -n ${!name:-} ]] || die "$name is required, see the head of $0"; done
no_credentials MODEL_NAME PROMPTS SCORER SECOND_SCORER JUDGE_BASE_URL OFFLINE_PAIRS
RUN=${OUTPUT_DIR:-$ROOT/runs/rounds}
RECIPE=${RECIPE:-$ROOT/pipelines/recipes/rounds}
ROUNDS=${ROUNDS:-2}
VAL_RATIO=${VAL_RATIO:-0.2}
REFERENCE=${REFERENCE:-previous}
[[ $ROUNDS =~ ^[1-9][0-9]*$ ]] || die "ROUNDS must be a whole number from 1, not $ROUNDS"
[[ $REFERENCE == previous || $REFERENCE == initial ]] || die "REFERENCE must be previous or initial, not $REFERENCE"
[[ -z ${OFFLINE_SHARE:-} || -n ${OFFLINE_PAIRS:-} ]] || die "OFFLINE_SHARE has no effect without OFFLINE_PAIRS"
OFFLINE_SHARE=${OFFLINE_SHARE:-0.5}
[[ $OFFLINE_SHARE =~ ^0?\.[0-9]*[1-9][0-9]*$ ]] || die "OFFLINE_SHARE must be above 0 and below 1, not $OFFLINE_SHARE"
[[ -d $RECIPE ]] || die "RECIPE $RECIPE: no such folder"
for file in "$RECIPE"/*.yaml; do
  [[ $file == "$RECIPE/*.yaml" || -f $ROOT/pipelines/recipes/rounds/${file##*/} ]] ||
    die "RECIPE $RECIPE: no stage reads ${file##*/}; those that are read: $(cd "$ROOT/pipelines/recipes/rounds" && echo *.yaml)"
done
data=(--dataset_name "$PROMPTS")
[[ $VAL_RATIO == 0 ]] || data+=(--val_ratio "$VAL_RATIO")

rewards=() functions=() judges=()
alone=() # options for scoring a round's only answer to a prompt: a judge compares it with round 0's
# add_scorer SCORER: add to the scorers that score.py asks
add_scorer() {
  case $1 in
    reward:?*) rewards+=("${1#reward:}") ;;
    judge:?*) judges+=("${1#judge:}") && alone=(--judge_against "$RUN/round_0/held_out/samples.jsonl") ;;
    function:?*:?*) functions+=("${1#function:}") ;;
    *) die "a scorer is reward:MODEL, judge:MODEL or function:FILE.py:NAME, not $1" ;;
  esac
}
add_scorer "$SCORER"
[[ -z ${SECOND_SCORER:-} ]] || add_scorer "$SECOND_SCORER"
[[ ${SECOND_SCORER:-} != "$SCORER" ]] || die "SECOND_SCORER is SCORER itself, which shows nothing"
((${#judges[@]} < 2)) || die "SECOND_SCORER must be of another kind than SCORER where that is a judge"
[[ -z ${JUDGE_BASE_URL:-} || ${#judges[@]} != 0 ]] || die "JUDGE_BASE_URL has no effect: no scorer is a judge"
scorers=()
((${#rewards[@]} == 0)) || scorers+=(--reward_models "${rewards[@]}")
((${#functions[@]} == 0)) || scorers+=(--score_function "${functions[@]}")
((${#judges[@]} == 0)) || scorers+=(--judge_model "${judges[0]}" ${JUDGE_BASE_URL:+--judge_base_url "$JUDGE_BASE_URL"})
[[ -z ${SECOND_SCORER:-} ]] || scorers+=(--rank_by "$SCORER")

# config STAGE: as in lib.sh, with other defaults
config() {
  if [[ -f $RECIPE/$1.yaml ]]; then echo "$RECIPE/$1.yaml"; else echo "$ROOT/pipelines/recipes/rounds/$1.yaml"; fi
}

# held_out ROUND MODEL: draw one answer to each held-out prompt and score it
held_out() {
  local own=round_$1/held_out
  stage "held_out_$1" "$own/samples.jsonl" \
    python "$ROOT/scripts/sample.py" --config "$(config held_out)" "${data[@]}" --held_out --num_samples 1 \
    --models "policy=$2" --output_dir "$RUN/$own"
  stage "held_out_score_$1" "$own/scores.jsonl" \
    python "$ROOT/scripts/score.py" --config "$(config score)" "${scorers[@]}" "${alone[@]}" \
    --samples "$RUN/$own/samples.jsonl" --output_dir "$RUN/$own"
}

# dpo_config ROUND: the recipe's config; after the first round, one that trains the existing adapter further
dpo_config() {
  local file=$RUN/round_$1/dpo.yaml
  if (($1 == 1)); then
    config dpo
  else
    [[ -z ${PREFLIGHT:-} ]] || file=$SCRATCH/dpo.yaml
    mkdir -p "$(dirname "$file")"
    python -m tandem.rounds.recipe "$(config dpo)" >"$file" || exit $? # set -e has no effect in $(…)
    echo "$file"
  fi
}

# pairs_of ROUND: the data that DPO trains on; for preflight, which checks options before there are pairs, the prompts
pairs_of() {
  if [[ -n ${PREFLIGHT:-} ]]; then
    echo "${data[@]:1:1}"
  elif [[ -z ${OFFLINE_PAIRS:-} ]]; then
    echo "$RUN/round_$1/pairs/pairs.jsonl"
  else
    python -m tandem.rounds.offline "$OFFLINE_PAIRS" "$RUN/round_0/held_out/prompts.jsonl" "$RUN/offline.jsonl" >&2 ||
      exit $?
    printf -- '- {dataset_name: "%s", weight: %s}\n- {dataset_name: "%s", weight: %s}\n' \
      "$RUN/round_$1/pairs/pairs.jsonl" "$(python -c "print(round(1 - $OFFLINE_SHARE, 6))")" \
      "$RUN/offline.jsonl" "$OFFLINE_SHARE" >"$RUN/round_$1/mixture.yaml"
    echo "$RUN/round_$1/mixture.yaml"
  fi
}

stages() {
  local round policy=$MODEL_NAME own pairs recipe reference mount split
  held_out 0 "$MODEL_NAME"
  [[ -z ${OFFLINE_PAIRS:-} ]] || stage check data_report.json \
    python "$ROOT/scripts/check_data.py" --config "$(config check)" --dataset_name "$OFFLINE_PAIRS" \
    --report "$RUN/data_report.json"
  for ((round = 1; round <= ROUNDS; round++)); do
    own=round_$round
    stage "sample_$round" "$own/samples.jsonl" \
      python "$ROOT/scripts/sample.py" --config "$(config sample)" "${data[@]}" --models "policy=$policy" \
      --parts "$ROUNDS" --part "$round" --output_dir "$RUN/$own"
    stage "score_$round" "$own/scores.jsonl" \
      python "$ROOT/scripts/score.py" --config "$(config score)" "${scorers[@]}" --samples "$RUN/$own/samples.jsonl" \
      --output_dir "$RUN/$own"
    stage "pairs_$round" "$own/pairs/pairs.jsonl" \
      python "$ROOT/scripts/make_pairs.py" --config "$(config make_pairs)" --scores "$RUN/$own/scores.jsonl" \
      --round "$round" --output_dir "$RUN/$own/pairs"
    pairs=$(pairs_of "$round")
    recipe=$(dpo_config "$round")
    reference=()
    [[ $REFERENCE == previous || $round == 1 ]] || reference=(--reference_model "$MODEL_NAME")
    mount=()
    [[ -z ${MOUNT_DIR:-} ]] || mount=(--mount_dir "$MOUNT_DIR/$own")
    split=()
    [[ -z ${PREFLIGHT:-} ]] || split=("${data[@]:2}")
    stage "dpo_$round" "$own/dpo" \
      launch "$ROOT/scripts/dpo.py" --config "$recipe" --dataset_name "$pairs" "${split[@]}" \
      --model_name_or_path "$policy" "${reference[@]}" "${mount[@]}" --output_dir "$RUN/$own/dpo"
    policy=$RUN/$own/dpo
    stage "report_$round" "$own/report.html" \
      python "$ROOT/scripts/report.py" --run_dir "$RUN/$own"
    held_out "$round" "$policy"
    stage "measure_$round" rounds.json \
      python "$ROOT/scripts/rounds.py" --config "$(config rounds)" --run_dir "$RUN"
    if [[ -z ${PREFLIGHT:-} ]] && python -c 'import json, sys
rows = json.load(open(sys.argv[1]))["rounds"]
sys.exit(not next(row["stop"] for row in rows if row["round"] == int(sys.argv[2])))' "$RUN/rounds.json" "$round"; then
      echo "Round $round brought no more on the held-out prompts than the rounds before it: stopping"
      break
    fi
  done
  stage report report.html \
    python "$ROOT/scripts/report.py" --run_dir "$RUN"
}

if [[ -z ${TANDEM_LOG:-} ]]; then
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
fi
preflight stages
trap - EXIT
[[ -z ${SCRATCH:-} ]] || rm -rf "$SCRATCH"
log_to "$RUN/rounds.log"
stages
cat "$RUN/rounds.md"
echo "Report: $RUN/report.html"
