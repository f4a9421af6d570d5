"""The type that trained weights are held in, and the alarm of a run that does not learn."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tandem.errors import UserError
from tests import tiny


def command(model: Path, data: Path, out: Path, flags: str) -> list[str]:
    common = f"--model_name_or_path {model} --dataset_name {data} --output_dir {out} --ref_cache {out.parent / 'cache'}"
    return f"{common} --save_strategy no --logging_steps 5 --per_device_train_batch_size 2 {flags}".split()


def alarms(out: Path) -> list[str]:
    file = out / "logs" / "alarms.jsonl"
    return [json.loads(line)["alarm"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("stage", ["dpo", "sft"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_in_half_precision_are_refused(
    script: Callable[[str], ModuleType], tiny_model: Path, tmp_path: Path, stage: str, dtype: str
):
    """Before a line of data is read."""
    data = tmp_path / "data.jsonl"
    data.write_text("no JSON\n")
    argv = command(tiny_model, data, tmp_path / "out", f"--dtype {dtype}")
    if stage == "sft":
        at = argv.index("--ref_cache")
        del argv[at : at + 2]
    with pytest.raises(UserError, match=f"--dtype {dtype} with all weights trains hardly anything.*--use_peft"):
        script(stage).main(argv)


def test_a_stored_type_is_not_trained_in(
    script: Callable[[str], ModuleType], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """At a learning rate whose steps bfloat16 would lose, nearly every weight moves."""
    base = tiny.save_model(tmp_path / "half", dtype="bfloat16")
    flags = "--dtype auto --bf16 true --learning_rate 1e-6 --max_steps 4"
    script("dpo").main(command(base, tiny_data, tmp_path / "out", flags))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    moved = sum((after[name] != before[name].float()).sum().item() for name in after)
    assert moved > 0.5 * sum(weight.numel() for weight in after.values())
    assert "--dtype auto: held in float32, not in the stored type" in capsys.readouterr().err


def test_a_whole_module_beside_an_adapter_is_held_in_float32(
    script: Callable[[str], ModuleType], tiny_data: Path, tmp_path: Path
):
    base = tiny.save_model(tmp_path / "half", dtype="bfloat16", tied=False)
    flags = "--dtype bfloat16 --bf16 true --use_peft --lora_modules_to_save lm_head --learning_rate 1e-6 --max_steps 4"
    script("dpo").main(command(base, tiny_data, tmp_path / "out", flags))
    (head,) = (w for n, w in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lm_head" in n)
    assert head.dtype == torch.float32
    moved = head != load_file(base / "model.safetensors")["lm_head.weight"].float()
    assert moved.float().mean() > 0.5


def test_a_run_that_does_not_learn_says_so(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    """At its end, which comes before the alarm's hundred steps; not where it learns."""
    for name, rate in (("still", "1e-9"), ("learns", "1e-3")):
        flags = f"--bf16 false --max_steps 20 --learning_rate {rate} --lr_scheduler_type constant"
        script("dpo").main(command(tiny_model, tiny_data, tmp_path / name, flags))
    assert alarms(tmp_path / "still").count("stuck") == 1
    assert "after 20 steps the loss is still at ln 2" in (tmp_path / "still" / "train.log").read_text()
    assert "stuck" not in alarms(tmp_path / "learns")


def test_the_start_tells_the_learning_rate(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    """That of the mode where none is given; and a default that was another when a run began stays that run's."""
    out = tmp_path / "out"
    argv = command(tiny_model, tiny_data, out, "--bf16 false --use_peft --max_steps 2 --warmup_steps 1")
    argv[argv.index("no")] = "steps"
    argv += ["--save_steps", "1"]
    script("dpo").main(argv)
    assert "learning rate     1e-05, linear, after 1 step of warm-up" in (out / "train.log").read_text()
    run = json.loads((out / "run.json").read_text())
    assert (
        run["config"]["learning_rate"] == 1e-5
        and "learning_rate" not in run["given"]
        and "warmup_steps" in run["given"]
    )
    # As an older Tandem had it, whose default was 1e-6
    del run["given"]
    run["config"]["learning_rate"] = 1e-6
    for folder in (out, out / "checkpoint-1", out / "checkpoint-2"):
        (folder / "run.json").write_text(json.dumps(run))
    (out / "manifest.json").unlink()
    for _ in range(2):
        script("dpo").main(argv)
        run = json.loads((out / "run.json").read_text())
        assert run["config"]["learning_rate"] == 1e-6 and "learning_rate" not in run["given"]
    with pytest.raises(UserError, match=r"learning_rate was 1e-06, is 0\.0001"):
        script("dpo").main([*argv, "--learning_rate", "1e-4"])
