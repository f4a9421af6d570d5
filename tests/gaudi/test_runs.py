"""The scripts themselves in the Gaudi environment: the command lines of the README, a kill, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Kills its own process after the third optimizer step, the moment at which nothing is being written
KILLER = """
import os, runpy, signal, sys
from transformers import TrainerCallback
from tandem.training.trainers import gaudi
init = gaudi.TandemGaudiDPOTrainer.__init__
class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
def killed(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.add_callback(Kill())
gaudi.TandemGaudiDPOTrainer.__init__ = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(script: str, model: Path, data: Path, out: Path, *flags: str) -> list[str]:
    common = f"--model_name_or_path {model} --dataset_name {data} --output_dir {out} --max_length=96 --bf16=False"
    common += " --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 1e-3"
    return [f"{ROOT}/scripts/{script}.py", *common.split(), *flags]


def run(*arguments: str, status: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize("use_peft", [True, False])
def test_resume_after_a_kill(tiny_model: Path, tiny_data: Path, tmp_path: Path, use_peft: bool):
    flags = ["--num_train_epochs", "2", "--save_steps", "2", "--logging_steps", "1", "--loss_type", "hinge"]
    flags += ["--ref_cache", str(tmp_path / "cache"), f"--use_peft={use_peft}", "--beta=0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*command("dpo", tiny_model, tiny_data, whole, *flags))
    run("-c", KILLER, *command("dpo", tiny_model, tiny_data, killed, *flags), status=-signal.SIGKILL)
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-2"]
    said = run(*command("dpo", tiny_model, tiny_data, killed, *flags))
    assert "checkpoint-2" in said
    weights = "adapter_model.safetensors" if use_peft else "model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()

    def logged(folder: Path) -> list[dict[str, float]]:
        history = json.loads((folder / "training_metrics.json").read_text())["log_history"]
        names = ("step", "loss", "rewards/margins", "num_tokens", "grad_norm", "tail/mean")
        return [{name: entry.get(name) for name in names} for entry in history if "loss" in entry]

    assert logged(killed) == logged(whole)
    margins = [(folder / "logs" / "margins" / "margins_log.jsonl").read_text() for folder in (killed, whole)]
    assert margins[0] == margins[1]
    assert len(margins[0].splitlines()) >= 6


def test_sft_then_dpo_with_evaluation(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    common = ("--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--logging_steps", "1")
    run(*command("sft", tiny_model, tiny_data, tmp_path / "sft", *common))
    cache = ("--ref_cache", str(tmp_path / "cache"))
    run(*command("dpo", tmp_path / "sft", tiny_data, tmp_path / "dpo", *common, *cache))
    for stage, names in (("sft", ["eval_loss"]), ("dpo", ["eval_loss", "eval_rewards/margins", "eval_logps/chosen"])):
        history = json.loads((tmp_path / stage / "training_metrics.json").read_text())["log_history"]
        evaluations = [entry for entry in history if "eval_loss" in entry]
        assert len(evaluations) == 2
        assert all(name in entry for name in names for entry in evaluations)
    assert (tmp_path / "dpo" / "manifest.json").exists()
    config = json.loads((tmp_path / "dpo" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # not Intel's class, which no other loader knows


def test_an_adapter_goes_on_from_itself(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Its reference is the adapter as it was, not the base: the first margins are 0, and the result has one adapter."""
    flags = ("--max_steps", "2", "--logging_steps", "1", "--ref_cache", str(tmp_path / "cache"))
    run(*command("dpo", tiny_model, tiny_data, tmp_path / "one", *flags, "--use_peft"))
    run(*command("dpo", tmp_path / "one", tiny_data, tmp_path / "two", *flags))
    history = json.loads((tmp_path / "two" / "training_metrics.json").read_text())["log_history"]
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert abs(history[1]["rewards/margins"]) > 1e-5
    assert not (tmp_path / "two" / "ref").exists()


def test_what_gaudi_lacks_is_refused_by_name(tiny_model: Path, tiny_data: Path, tmp_path: Path):
    flags = ("--loss_type", "apo_zero", "--use_weighting", "--attn_implementation", "sdpa")
    said = run(*command("dpo", tiny_model, tiny_data, tmp_path / "out", *flags), status=2)
    for name in ("--loss_type apo_zero", "--use_weighting", "--attn_implementation"):
        assert name in said
    assert not (tmp_path / "out").exists()
