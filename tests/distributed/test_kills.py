"""SFT → DPO on two ranks, killed 25 times, each time begun again by the same command: nothing of it is to be seen."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.monitor.margins import read_margins_log
from tandem.runs import is_complete, sha256_file
from tests import tiny
from tests.distributed.kills import TARGETS, Kill, Run
from tests.distributed.ranks import COMMON, ROOT

PIPELINE = """#!/usr/bin/env bash
source "{root}/pipelines/lib.sh"
PATH={bin}:$PATH
RUN={run}
log_to "$RUN/log"
both_ranks() {{
  python -m tandem.launch torchrun --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0 "$@"
}}
stage sft sft both_ranks "$ROOT/scripts/sft.py" --config {config}/sft.yaml --model_name_or_path {model} \\
  --output_dir "$RUN/sft"
stage merge_sft merged python "$ROOT/scripts/merge_lora.py" --adapter "$RUN/sft" --output_dir "$RUN/merged"
stage dpo dpo both_ranks "$ROOT/scripts/dpo.py" --config {config}/dpo.yaml --model_name_or_path "$RUN/merged" \\
  --output_dir "$RUN/dpo"
"""
TRAINING = COMMON | {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 1e-3,
    "max_steps": 30,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_total_limit": 2,
    "use_peft": True,
    "lora_dropout": 0.1,
}
CLOCKS = ("runtime", "per_second", "system/", "total_flos")


def pipeline(folder: Path, model: Path, data: Path) -> Run:
    folder.mkdir()
    own = {"sft": {}, "dpo": {"disable_dropout": False, "ref_cache": str(folder / "cache"), "tail_warmup_steps": 8}}
    for stage, options in own.items():
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(TRAINING | {"dataset_name": str(data)} | options))
    script = folder / "pipeline.sh"
    paths = {"root": ROOT, "bin": Path(sys.executable).parent, "run": folder / "run", "config": folder, "model": model}
    script.write_text(PIPELINE.format(**paths))
    script.chmod(0o755)
    return Run([str(script)], folder / "run", folder / "cache", seed=5)


def result(folder: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    logs = {}
    for stage in ("sft", "dpo"):
        history = json.loads((folder / stage / "training_metrics.json").read_text())["log_history"]
        logs[stage] = [
            {name: value for name, value in entry.items() if not any(clock in name for clock in CLOCKS)}
            for entry in history
        ]
    margins = folder / "dpo" / "logs" / "margins"
    arrays = {str(path.relative_to(margins)): sha256_file(path) for path in margins.rglob("*.npy")}
    weights = {
        name: sha256_file(folder / name)
        for name in ("sft/adapter_model.safetensors", "merged/model.safetensors", "dpo/adapter_model.safetensors")
    }
    return {"logs": logs, "margins": read_margins_log(margins), "arrays": arrays, "weights": weights}


def plan() -> list[Kill]:
    """25 kills: of each stage, at each kind of moment, of each target."""
    rng = random.Random(2)
    moments = [("sft", "step", 3), ("sft", "evaluation", 2), ("sft", "save", 3)]
    moments += [("dpo", "reference", 4), ("dpo", "step", 5), ("dpo", "evaluation", 4), ("dpo", "save", 4)]
    kills: list[Kill] = []
    for stage, moment, count in moments:
        for _ in range(count):
            kills.append(Kill(stage, moment, TARGETS[len(kills) % 4], rng.choice((1, 1, 2))))
    for stage in ("sft", "dpo"):
        first = next(index for index, kill in enumerate(kills) if kill.stage == stage)
        last = first + sum(kill.stage == stage for kill in kills)
        begin = first + 4 * (stage == "dpo")  # the reference's come first; the others in any order
        mixed = kills[begin:last]
        rng.shuffle(mixed)
        kills[begin:last] = mixed
    return kills


@pytest.mark.slow
def test_25_kills_leave_no_trace(tmp_path: Path, tiny_model: Path):
    data = tmp_path / "data"
    data.mkdir()
    tiny.save_pairs(data / "train.jsonl", tiny.hh_rows(200))
    tiny.save_pairs(data / "test.jsonl", tiny.hh_rows(40, start=200))
    straight = pipeline(tmp_path / "straight", tiny_model, data)
    straight.finish()
    disturbed = pipeline(tmp_path / "disturbed", tiny_model, data)
    hits: dict[str, int] = {}
    for kill in plan():
        hits[kill.moment] = hits.get(kill.moment, 0) + disturbed.killed(kill)
        print(kill, hits, flush=True)
    assert all(hits.values()), hits  # each kind of moment was really met
    assert not is_complete(disturbed.folder / "dpo")
    disturbed.finish()
    assert result(disturbed.folder) == result(straight.folder)
    assert [entry["step"] for entry in result(straight.folder)["logs"]["dpo"] if "loss" in entry] == [*range(1, 31)]
