"""TRL's trainers on CPU, CUDA and MPS, with checkpoints that are complete or absent and pairs that keep their ids."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tandem.runs import write_manifest


class _CompleteCheckpoints:
    """Mixin over transformers' Trainer: a checkpoint counts once its manifest, written last, is there."""

    args: Any
    state: Any
    accelerator: Any

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Older checkpoints may go only when this one is complete, so Trainer must not rotate by itself
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)


class PairCollator(DataCollatorForPreference):
    """TRL's collator that also hands on each pair's id, as a list of text under `pair_id`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"pair_id": [example["pair_id"] for example in examples]}


class TandemDPOTrainer(_CompleteCheckpoints, DPOTrainer):
    """TRL's DPOTrainer on tokenized pairs (`data.texts.tokenize_pair`), whose batches carry `pair_id`."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "pair_id" not in self._signature_columns:
            self._signature_columns.append("pair_id")

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {key: value for key, value in inputs.items() if key != "pair_id"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class TandemSFTTrainer(_CompleteCheckpoints, SFTTrainer):
    """TRL's SFTTrainer."""
