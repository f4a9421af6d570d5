"""A pair that turns to NaN in the real trainer: training, and the pipeline, stop in that very step and say so."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tandem.errors import AlarmStop
from tandem.models.load import load_model
from tandem.monitor.margins import read_margins, read_margins_log
from tandem.options.model import ModelOptions
from tandem.runs import checkpoints, damage, read_jsonl
from tests import tiny
from tests.pipelines.test_pipeline import Pipeline, write_recipe

RARE = "Q"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in which one token is NaN. Its head is its own, else every log-prob would be NaN."""
    folder = tiny.save_model(tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    untied = LlamaForCausalLM(config)
    with torch.no_grad():
        untied.model.embed_tokens.weight[tiny.tokenizer().convert_tokens_to_ids(RARE)] = torch.nan
    untied.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = tiny.hh_rows(30)
    rows[17]["rejected"] += f" {RARE}"  # of the answer that SFT does not see
    tiny.save_pairs(folder / "train.jsonl", rows)
    tiny.save_pairs(folder / "test.jsonl", tiny.hh_rows(10, start=30))
    return folder


def check_stop(out: Path, said: str) -> None:
    """It came in the step that dealt the pair, which is named; what was before is kept, and is good."""
    (alarm,) = read_jsonl(out / "logs" / "alarms.jsonl")
    step = alarm["step"]
    assert step > 2  # so that there was a checkpoint before
    records, _ = read_margins_log(out / "logs" / "margins")
    assert [record["step"] for record in records] == list(range(1, step))
    arrays = [read_margins(out / "logs" / "margins" / record["npy"]) for record in records]
    before = {str(pair) for array in arrays for pair in array["pair_id"]}
    assert len(alarm["pair_ids"]) == 1 and alarm["pair_ids"][0] not in before
    assert f"stopped in step {step}: margin is nan (pairs {alarm['pair_ids'][0]}); " in said
    with safe_open(out / "logs" / alarm["batches"][0], "pt") as batch:
        ids = batch.get_tensor("input_ids")
        assert alarm["pair_ids"][0] in batch.metadata()["pair_ids"]
    assert tiny.tokenizer().convert_tokens_to_ids(RARE) in ids
    last = checkpoints(out)[-1]
    assert last.name == f"checkpoint-{step - 1}"
    assert damage(last) is None
    assert all(tensor.isfinite().all() for tensor in load_file(last / "adapter_model.safetensors").values())
    load_model(ModelOptions(str(last)))
    assert not (out / "adapter_model.safetensors").exists()


def test_a_nan_stops_the_training_in_its_step(
    tmp_path: Path, model: Path, data: Path, script: Callable[[str], ModuleType]
):
    options = (
        f"--model_name_or_path {model} --dataset_name {data} --ref_cache {tmp_path}/cache --use_peft --bf16 false "
    )
    options += (
        f"--output_dir {tmp_path}/out --per_device_train_batch_size 4 --save_steps 2 --gradient_checkpointing false"
    )
    with pytest.raises(AlarmStop) as stop:
        script("dpo").main(options.split())
    check_stop(tmp_path / "out", str(stop.value))
    assert stop.value.exit_code == 3


@pytest.mark.slow
def test_a_nan_stops_the_pipeline_in_its_step(tmp_path: Path, model: Path, data: Path):
    pipeline = Pipeline(tmp_path, model, data, "http://127.0.0.1:1/v1")
    del pipeline.environment["MOUNT_DIR"]
    write_recipe(pipeline.recipe, dpo={"ref_cache": str(tmp_path / "cache"), "save_steps": 2}, sft={"max_steps": 1})
    code, screen = pipeline()
    out = pipeline.run / "dpo"
    assert code == 3, screen
    assert screen.splitlines()[-1] == (
        f"== dpo was stopped by an alarm: see {out}/logs/alarms.jsonl (exit code 3). "
        f"Log: {pipeline.run}/dpo_pipeline_sanity.log. The same command goes on from here."
    )
    check_stop(out, screen)
