"""A merge file by file gives the tensors and the configuration of the merge of whole models, with a file's memory."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.loading import save_model
from tandem.models import merge as merging
from tandem.models import shard_merge
from tandem.models.merge import MergeOptions, merge
from tests import wide
from tests.adapters import save_kind

PLAIN = ("lora", "rslora", "patterns")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def in_files(source: Path, folder: Path, size: str) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(folder, max_shard_size=size)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", ["1MB", "1GB"])
@pytest.mark.parametrize("kind", PLAIN)
def test_the_same_bits_as_a_whole_merge(tmp_path: Path, kind: str, size: str, monkeypatch: pytest.MonkeyPatch):
    base = in_files(wide.save_model(tmp_path / "made"), tmp_path / "base", size)
    adapter = save_kind(tmp_path / "adapter", base, kind)
    made = {}
    for name in ("files", "whole"):
        if name == "whole":
            monkeypatch.setattr(shard_merge, "merge_files", lambda *_: None)
        merge(MergeOptions(str(adapter), str(tmp_path / name)))
        made[name] = tensors(tmp_path / name)
    assert made["files"].keys() == made["whole"].keys()
    changed = tensors(base)
    for name, weight in made["whole"].items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(made["files"][name], weight), name
    assert sum(not torch.equal(changed[name], weight) for name, weight in made["files"].items()) >= 2
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("files", "whole")]
    assert configs[0] == configs[1]
    assert {file.name for file in (tmp_path / "files").glob("*.safetensors*")} == {
        file.name for file in base.glob("*.safetensors*")
    }


@pytest.mark.parametrize("kind", ["dora", "loha", "embeddings", "saved_modules"])
def test_more_than_two_matrices_is_merged_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    base = wide.save_model(tmp_path / "base")
    whole = []
    merge_whole = merging.merged_whole
    monkeypatch.setattr(merging, "merged_whole", lambda *given: whole.append(given) or merge_whole(*given))
    merge(MergeOptions(str(save_kind(tmp_path / "adapter", base, kind)), str(tmp_path / "merged")))
    assert len(whole) == 1


_MERGE = """
import re, sys, threading, time
import tandem.models.shard_merge, torch
from tandem.models.merge import MergeOptions, merge

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

start, peak = anonymous(), [0]

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
merge(MergeOptions(sys.argv[1], sys.argv[2]))
print(peak[0] - start)
"""


@pytest.mark.slow
def test_no_more_than_two_files_are_in_memory(tmp_path: Path):
    """Of a model of 465M bfloat16 weights in four files; whole, in float32, it would take seven times as much."""
    made = save_model(tmp_path / "made", 37, 1024)
    base = in_files(made, tmp_path / "base", "240MB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    adapter_size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    del model
    gc.collect()
    files = sorted(base.glob("*.safetensors"))
    command = [sys.executable, "-c", _MERGE, str(tmp_path / "adapter"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    shard = max(file.stat().st_size for file in files)
    found = int(done.stdout.split()[-1]) / shard
    print(f"{len(files)} files of {shard >> 20} MiB, {found:.2f} in memory, an adapter of {adapter_size >> 20} MiB too")
    assert found < 2.2
