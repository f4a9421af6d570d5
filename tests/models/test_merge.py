import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.errors import UserError
from tandem.models.merge import MergeOptions, MergeShardsOptions, merge, merge_shards
from tandem.runs import is_complete, sha256_file, write_json, write_manifest
from tests import tiny


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A LoRA adapter that changes something (its B is not zero)."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_merged_weights_by_hand(tmp_path: Path, adapter: Path, tiny_model: Path):
    """W + alpha/r · B·A, layer by layer."""
    merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    assert is_complete(tmp_path / "merged")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "merged"))
    lora = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    changed = 0
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = torch.zeros_like(weight)
        if f"{stem}.lora_A.weight" in lora:
            delta = config["lora_alpha"] / config["r"] * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
            changed += 1
        torch.testing.assert_close(merged[name], weight + delta)
    assert changed == 14  # 7 linear layers in each of 2 blocks


def test_the_merged_folder_stands_alone(tmp_path: Path, adapter: Path, tiny_model: Path):
    merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    text = "say a cat"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_model, tmp_path / "merged")]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[1].chat_template == tiny.TEMPLATE
    assert (logits(tmp_path / "merged") - logits(tiny_model)).abs().max() > 0.01


def test_another_base(tmp_path: Path, adapter: Path):
    other = tiny.save_model(tmp_path / "other", seed=1)
    merge(MergeOptions(str(adapter), str(tmp_path / "on_other"), base_model=str(other)))
    merge(MergeOptions(str(adapter), str(tmp_path / "on_own")))
    assert (logits(tmp_path / "on_other") - logits(tmp_path / "on_own")).abs().max() > 0.01


def test_an_adapter_on_an_adapter(tmp_path: Path, adapter: Path, tiny_model: Path):
    """The base of the second adapter is the first adapter: both must be in the result."""
    second = shutil.copytree(adapter, tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(adapter)}
    (second / "adapter_config.json").write_text(json.dumps(config))
    merge(MergeOptions(str(second), str(tmp_path / "both")))
    merge(MergeOptions(str(adapter), str(tmp_path / "once")))
    merge(MergeOptions(str(adapter), str(tmp_path / "twice"), base_model=str(tmp_path / "once")))
    torch.testing.assert_close(logits(tmp_path / "both"), logits(tmp_path / "twice"), atol=1e-5, rtol=1e-5)


def test_dtype(tmp_path: Path, adapter: Path):
    merge(MergeOptions(str(adapter), str(tmp_path / "merged"), dtype="bfloat16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_the_base_by_default(tmp_path: Path, adapter: Path, tiny_model: Path, dtype: str):
    """Two types among the models of an evaluation would have it take float32, twice the memory, for all."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    merge(MergeOptions(str(adapter), str(tmp_path / "merged"), base_model=str(base)))
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}


def test_a_full_model_is_copied(tmp_path: Path, tiny_model: Path):
    source = shutil.copytree(tiny_model, tmp_path / "trained")
    (source / "config.yaml").write_text("a: 1")
    (source / "run.json").write_text("{}")
    (source / "checkpoint-3").mkdir()
    write_manifest(source)
    merge(MergeOptions(str(source), str(tmp_path / "merged")))
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in tiny_model.iterdir()} | {"manifest.json"}
    weights = [sha256_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "merged")]
    assert weights[0] == weights[1]


def test_a_former_merge_is_replaced(tmp_path: Path, adapter: Path, tiny_model: Path):
    merge(MergeOptions(str(tiny_model), str(tmp_path / "merged")))
    merge(MergeOptions(str(adapter), str(tmp_path / "merged")))
    assert (logits(tmp_path / "merged") - logits(tiny_model)).abs().max() > 0.01


def test_nothing_of_another_kind_is_removed(tmp_path: Path, adapter: Path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    training = shutil.copytree(adapter, tmp_path / "training")
    (training / "config.yaml").write_text("a: 1")
    write_manifest(training)
    for folder in (notes, training, tmp_path, notes / "thesis.tex"):
        with pytest.raises(UserError) as error:
            merge(MergeOptions(str(training), str(folder)))
        assert str(error.value) == f"--output_dir {folder}: holds other files, which a merge would remove"
    (tmp_path / "empty").mkdir()
    merge(MergeOptions(str(training), str(tmp_path / "empty")))


def test_an_unfinished_training_is_not_merged(tmp_path: Path, adapter: Path):
    training = shutil.copytree(adapter, tmp_path / "training")
    (training / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="its training has not finished; run it again to resume it"):
        merge(MergeOptions(str(training), str(tmp_path / "merged")))


def test_broken_weights_leave_no_folder(tmp_path: Path, adapter: Path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[:] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--adapter {broken}: cannot be merged: .*NaN"):
        merge(MergeOptions(str(broken), str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_refusals(tmp_path: Path, tiny_model: Path):
    with pytest.raises(UserError, match=f"--adapter {tmp_path}: neither an adapter's folder nor a model's"):
        merge(MergeOptions(str(tmp_path), str(tmp_path / "out")))
    with pytest.raises(UserError, match=f"--base_model has no effect: {tiny_model} is a full model"):
        merge(MergeOptions(str(tiny_model), str(tmp_path / "out"), base_model="x"))
    with pytest.raises(UserError, match=f"--dtype has no effect: {tiny_model} is a full model"):
        merge(MergeOptions(str(tiny_model), str(tmp_path / "out"), dtype="bfloat16"))


def test_a_checkpoint_in_shards(tmp_path: Path, tiny_model: Path):
    """One shard, as a process alone would leave it; those of real runs are in tests/distributed."""
    checkpoint, merged = tmp_path / "checkpoint-3", tmp_path / "merged"
    shutil.copytree(tiny_model, checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(tiny_model / "model.safetensors")
    dcp.save({"model": weights}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    write_json(checkpoint / "tandem_counters.json", {})
    options = MergeShardsOptions(checkpoint=str(checkpoint), output_dir=str(merged))
    with pytest.raises(UserError, match="cannot be used: it has no manifest"):
        merge_shards(options)
    write_manifest(checkpoint)
    merge_shards(options)
    assert is_complete(merged)
    assert torch.equal(logits(merged), logits(tiny_model))
    AutoTokenizer.from_pretrained(merged)
    assert not (merged / "tandem_counters.json").exists()
    with pytest.raises(UserError, match="holds no shards of FSDP"):
        merge_shards(MergeShardsOptions(checkpoint=str(tiny_model), output_dir=str(tmp_path / "other")))
