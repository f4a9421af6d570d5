"""The stages that are ended at each of their calls: how each is prepared, and its command."""

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


@dataclass(frozen=True)
class Scenario:
    """A stage in a folder of its own.

    Attributes:
        prepare: makes what is there before.
        run: the command, which is to end the same however often it was ended before.
        whole_or_absent: what it leaves that must be one or the other, manifest or not.
    """

    prepare: Work
    run: Work
    whole_or_absent: tuple[str, ...] = ()

    def load(self) -> None:
        """Import what `run` will."""
        import trackio  # noqa: F401  which TRL looks for at each save


def command(name: str, **options: Any) -> None:
    import importlib

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


MERGED = ("merged",)
SCENARIOS = {
    "merge": Scenario(adapter, merge, MERGED),
    "merge_over": Scenario(over_another, merge, MERGED),
    "dpo": Scenario(pairs, train("dpo", use_peft="true", mirrored=True, eval_strategy="steps", eval_steps=2)),
    "sft": Scenario(pairs, train("sft")),
}
