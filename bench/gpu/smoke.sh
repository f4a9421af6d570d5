#!/usr/bin/env bash
# On a GPU machine, in a folder that prepare.sh packed: bash FOLDER/p/bench/gpu/smoke.sh PART
# Each part takes at most four minutes; what proves most comes first. Every step has its own limit, and the next one runs
# whatever became of it. Append what it prints to bench/RESULTS.md.
#   1  versions, and the engine: kernels against float64, the forward against TRL's, host waits
#   2  a few steps of each training mode, resume, merge, evaluation
#   3  all weights of 1B beside TRL with its reference precomputed
#   4  LoRA at 8B beside TRL
set -uo pipefail
part=${1:?usage: bash smoke.sh 1|2|3|4}
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
packed=$(dirname "$project")
site=${TMPDIR:-/tmp}/tandem-site
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$site:$project/src:$project
[ -d "$site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$packed"/whl/*.whl
cd "$project" || exit 1
failed=0
step() {
  local name=$1 limit=$2 started=$SECONDS rc
  shift 2
  echo "##### $name"
  timeout "$limit" "$@" 2>&1 | grep -vE 'it/s\]|[Ww]arning' | tail -60
  rc=${PIPESTATUS[0]}
  echo "##### $name rc=$rc $((SECONDS - started)) s"
  [ "$rc" = 0 ] || failed=1
}
tests() { step "$1" "$2" python3 -m pytest -q -o addopts= --import-mode=importlib -p no:cacheprovider "${@:3}"; }
own=()
[ ! -f "$packed/pairs.jsonl" ] || own=(--data "$packed/pairs.jsonl")
ratios() {
  step "$1" "$2" python3 bench/run.py --device cuda --settings "$1" --repeats 1 --model "$packed/tok" "${own[@]}"
}
case $part in
  1)
    step versions 40 python3 -c "import torch, transformers, trl, peft, accelerate, triton
print(torch.cuda.get_device_name(), *(f'{m.__name__} {m.__version__}' for m in (torch, triton, transformers, trl, peft, accelerate)))"
    tests engine 190 tests/gpu/test_gpu_engine.py ;;
  2) tests runs 235 tests/gpu/test_gpu_runs.py -k 'not bench' --durations 12 ;;
  3) ratios 1B_short 235 ;;
  4) ratios 8B_lora_short 235 ;;
  *) echo "no part $part: 1 to 4" >&2; exit 2 ;;
esac
exit "$failed"
