#!/usr/bin/env bash
# Pack what a GPU machine without network needs to try Tandem: MODEL=… bash bench/gpu/prepare.sh FOLDER, in the project's
# root. FOLDER (about 30 MB) gets wheels for Python 3.12 on a machine that has torch with CUDA 13.0, the project at HEAD,
# a tokenizer (MODEL, a model's folder) and PAIRS, a .jsonl of preference pairs. Then, there, part by part:
# bash FOLDER/p/bench/gpu/smoke.sh 1
set -Eeuo pipefail
out=${1:?usage: MODEL=… bash bench/gpu/prepare.sh FOLDER}
model=${MODEL:?MODEL: a folder with a tokenizer, such as the one that make demo leaves in ~/.cache/tandem}
pairs=${PAIRS:-}
rm -rf "$out"
mkdir -p "$out"/{whl,p,tok}
git archive HEAD | tar x -C "$out/p"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 -d "$out/whl" \
  transformers==5.23.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 'dill<0.4.2' 'multiprocess<0.70.20' \
  bitsandbytes==0.50.2 pytest iniconfig pluggy
python3 - "$out" <<'P' # of bitsandbytes keep the library for CUDA 13.0 alone: 43 -> 4 MB
import glob, os, sys, zipfile
(wheel,) = glob.glob(sys.argv[1] + "/whl/bitsandbytes*.whl")
with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(wheel + ".new", "w", zipfile.ZIP_DEFLATED) as new:
    for item in old.infolist():
        if not item.filename.endswith(".so") or item.filename.endswith(("cuda130.so", "_cpu.so")):
            new.writestr(item, old.read(item))
os.replace(wheel + ".new", wheel)
P
cp "$model"/{tokenizer.json,tokenizer_config.json} "$out/tok/"
[ ! -f "$model/chat_template.jinja" ] || cp "$model/chat_template.jinja" "$out/tok/"
[ -z "$pairs" ] || cp "$pairs" "$out/pairs.jsonl"
du -sh "$out"
