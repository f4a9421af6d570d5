"""The stages that are ended at each of their calls: how each is prepared, and its command."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tiny

Work = Callable[[Path], None]

TRAINING: dict[str, Any] = {
    "bf16": "false",
    "gradient_checkpointing": "false",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_length": 128,
    "max_steps": 4,
    "save_steps": 2,
    "save_total_limit": 1,
}


TRAINED = (
    "tandem.commands.dpo",
    "tandem.training.stages",
    "tandem.training.trainers.trl",
    "trackio",
)  # TRL looks for it
LOADED = ("tandem.commands.merge_lora", "tandem.models.adapters", "tandem.models.load", "accelerate.utils")
ANSWERED = ("tandem.commands.evaluate", "tandem.commands.compare", "tandem.commands.generate", "tandem.models.scorer")
A_ROUND = ("tandem.rounds.sample", "tandem.rounds.score", "tandem.rounds.pairs", "tandem.models.load")


@dataclass(frozen=True)
class Scenario:
    """A stage in a folder of its own.

    Attributes:
        prepare: makes what is there before.
        run: the command, which is to end the same however often it was ended before.
        whole_or_absent: what it leaves that must be one or the other, manifest or not.
        modules: imported once for all attempts.
    """

    prepare: Work
    run: Work
    whole_or_absent: tuple[str, ...] = ()
    modules: tuple[str, ...] = TRAINED

    def load(self) -> None:
        """Import what `run` will."""
        for module in self.modules:
            importlib.import_module(module)


def command(name: str, **options: Any) -> None:
    argv = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    importlib.import_module(f"tandem.commands.{name}").main(argv)


def model(folder: Path) -> None:
    tiny.save_model(folder / "model")


def adapter(folder: Path) -> None:
    model(folder)
    tiny.save_adapter(folder / "adapter", folder / "model")


def merge(folder: Path) -> None:
    command("merge_lora", adapter=folder / "adapter", output_dir=folder / "merged")


def over_another(folder: Path) -> None:
    """A merge of another adapter is there already, of more files."""
    adapter(folder)
    tiny.save_adapter(folder / "other", folder / "model", seed=1)
    command("merge_lora", adapter=folder / "other", output_dir=folder / "merged")


def pairs(folder: Path) -> None:
    model(folder)
    (folder / "data").mkdir()
    tiny.save_pairs(folder / "data" / "train.jsonl", tiny.hh_rows(12))
    tiny.save_pairs(folder / "data" / "test.jsonl", tiny.hh_rows(4, start=12))


def train(stage: str, **options: Any) -> Work:
    def run(folder: Path) -> None:
        own = TRAINING | options
        if stage == "dpo":
            own["ref_cache"] = folder / "cache"
        if own.pop("mirrored", False):
            own["mount_dir"] = folder / "drive"
        data, out = folder / "data", folder / stage
        command(stage, model_name_or_path=folder / "model", dataset_name=data, output_dir=out, **own)

    return run


def shards(folder: Path) -> None:
    """A checkpoint whose weights FSDP has left in shards."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    from tandem.runs import write_manifest

    model(folder)
    checkpoint = folder / "checkpoint-1"
    tiny.save_model(checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    dcp.save({"model": weights}, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    write_manifest(checkpoint)


def trained_over(folder: Path) -> None:
    """Another run has finished there, and is to be replaced."""
    pairs(folder)
    train("dpo", use_peft="true", max_steps=2, beta=0.3)(folder)


def models(folder: Path) -> None:
    pairs(folder)
    tiny.save_model(folder / "sft", seed=1)
    tiny.save_model(folder / "dpo", seed=2)


def measured(folder: Path) -> None:
    command(
        "evaluate",
        dataset_name=folder / "data",
        max_length=128,
        eval_bf16="false",
        kl_prompts=2,
        kl_max_new_tokens=4,
        reference_model=folder / "model",
        sft_model=folder / "sft",
        dpo_model=folder / "dpo",
        output_file=folder / "run" / "results.json",
    )


def compared(folder: Path) -> None:
    given = {"base_model": folder / "model", "sft_model": folder / "sft", "finetuned_model": folder / "dpo"}
    command("compare", dataset_name=folder / "data", max_new_tokens=8, output_dir=folder / "run", **given)


def generated(folder: Path) -> None:
    models = (f"{label}={folder / name}" for label, name in (("base", "model"), ("dpo", "dpo")))
    argv = ["--models", *models, "--dataset_name", str(folder / "data"), "--max_new_tokens", "8", "--batch_size", "2"]
    importlib.import_module("tandem.commands.generate").main([*argv, "--output_dir", str(folder / "run")])


def reported(folder: Path) -> None:
    command("report", run_dir=folder / "run")


def finished(folder: Path) -> None:
    """A run whose report is to be written."""
    models(folder)
    measured(folder)
    compared(folder)


def prompts(folder: Path) -> None:
    tiny.save_model(folder / "model", tied=False)
    tiny.save_pairs(folder / "prompts.jsonl", [{"prompt": f"say {word}"} for word in tiny.WORDS[:4]])
    (folder / "check.py").write_text("def score(prompt, answer, row):\n    return len(answer) % 7\n")


def a_round(folder: Path) -> None:
    """Answers are drawn, scored and paired."""
    models = f"policy={folder / 'model'}"
    sampling = {"num_samples": 3, "max_new_tokens": 300, "temperature": 1.0, "batch_size": 4}
    command("sample", dataset_name=folder / "prompts.jsonl", models=models, output_dir=folder / "round", **sampling)
    function = f"{folder}/check.py:score"
    samples, scores = folder / "round" / "samples.jsonl", folder / "round" / "scores.jsonl"
    command("score", samples=samples, score_function=function, output_dir=folder / "round")
    pairing = {"keep_near_duplicates": "true", "fail_on": "none"}
    command("make_pairs", scores=scores, round=1, output_dir=folder / "round" / "pairs", **pairing)


def shards_merged(folder: Path) -> None:
    command("merge_shards", checkpoint=folder / "checkpoint-1", output_dir=folder / "merged")


def copied(folder: Path) -> None:
    command("merge_lora", adapter=folder / "model", output_dir=folder / "merged")


def logged(folder: Path) -> None:
    """Margins of 18 steps, packed by fours after the fourth; gone on with from each third step, as from checkpoints."""
    import numpy as np

    from tandem.monitor import packs
    from tandem.monitor.margins import MarginsLog, read_margins_log
    from tandem.monitor.tail import TailRecord

    packs.LOOSE = packs.PER_PACK = 4
    records, _ = read_margins_log(folder / "margins")
    done = max((record["step"] for record in records), default=0) // 3 * 3
    log = MarginsLog(folder / "margins")
    log.truncate_after(done)
    for step in range(done + 1, 19):
        margins = np.array([step, -step], np.float32)
        log.write_step(1 + (step - 1) // 7, step, ["a", f"pair {step}"], margins, TailRecord(beta=0.1, tau=None))
    log.flush()


def nothing(folder: Path) -> None:
    pass


MERGED = ("merged",)
SCENARIOS = {
    "merge": Scenario(adapter, merge, MERGED, LOADED),
    "merge_over": Scenario(over_another, merge, MERGED, LOADED),
    "merge_shards": Scenario(shards, shards_merged, MERGED, LOADED),
    "merge_copy": Scenario(model, copied, MERGED, LOADED),
    "dpo": Scenario(pairs, train("dpo", use_peft="true", mirrored=True, eval_strategy="steps", eval_steps=2)),
    "dpo_anew": Scenario(trained_over, train("dpo", use_peft="true", max_steps=2, resume_from_checkpoint="no")),
    "sft": Scenario(pairs, train("sft")),
    "margins": Scenario(nothing, logged, modules=("tandem.monitor.margins",)),
    "evaluate": Scenario(models, measured, modules=ANSWERED),
    "compare": Scenario(models, compared, modules=ANSWERED),
    "generate": Scenario(models, generated, modules=ANSWERED),
    "report": Scenario(finished, reported, modules=("tandem.commands.report",)),
    "round": Scenario(prompts, a_round, modules=A_ROUND),
}
