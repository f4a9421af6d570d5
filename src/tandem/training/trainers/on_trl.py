"""What Tandem's two trainers on TRL have in common: several processes, the start table, logs, evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Sampler

from tandem.data.turn_end import named
from tandem.engine.balance import Ints
from tandem.log import logger
from tandem.models.fits import adapter_told
from tandem.models.load import adapters_of_whole_layers
from tandem.models.shards import gather_tied_head
from tandem.runs import CARD
from tandem.training.held import upcast_trained
from tandem.training.trainers.base import TandemTrainer
from tandem.training.trainers.checkpoints import LossSums
from tandem.training.trainers.evenly import EvenDealing
from tandem.training.trainers.held_out import Rows
from tandem.training.trainers.sharding import (
    average_cut_adapter,
    check_saves_whole,
    gather_once,
    learning_rate,
    save_without_weights,
    saves_shards,
    shard,
    shard_by_layer,
    trained,
)
from tandem.training.trainers.topology import Topology


class OnTRL(TandemTrainer):
    """A trainer of TRL on transformers 5.

    Args:
        undealt: see `EvenDealing`.

    Attributes:
        unit: what it trains on, as the start table calls it.
        rows: how its batches are made.
        topology: what the run consists of; set once there is an accelerator.
    """

    unit: ClassVar[str]
    rows: ClassVar[Rows]
    topology: Topology

    def __init__(self, *arguments: Any, undealt: Callable[[Any], str | None] = lambda _: None, **keywords: Any) -> None:
        self.loss_sums = LossSums(self)
        self.dealing = EvenDealing(self, undealt, self.costs, self.is_padded)
        self._ends = named(keywords["processing_class"])
        with adapters_of_whole_layers(), adapter_told():
            super().__init__(*arguments, **keywords)
        if self.topology.engine in ("single", "ddp") and (self.args.bf16 or self.args.fp16):
            upcast_trained(self.model)

    def costs(self) -> Ints:
        """(n,) what each of the training pairs takes, in any unit."""
        raise NotImplementedError

    def is_padded(self) -> bool:
        """Whether a micro-batch's rows are padded to its longest."""
        raise NotImplementedError

    def table_rows(self) -> dict[str, str]:
        """Rows of the start table besides those of `Topology.table`."""
        return self.dealing.table_row()

    def counters(self) -> dict[str, Any]:
        return self.loss_sums.counters()

    def restore_counters(self, counters: dict[str, Any]) -> None:
        self.loss_sums.restore(counters)

    # Processes

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.n_gpu > 1:  # for which transformers takes one process that sees several GPUs as DataParallel
            self.args._n_gpu = 1
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            shard_by_layer(self.accelerator, self.model)
        check_saves_whole(self.accelerator)
        if getattr(self.model, "fsdp_size", None) not in (None, 1):
            gather_tied_head(self.model)
        self.topology = Topology.of(self.accelerator, self.args, self.model)
        if self.accelerator.is_main_process:
            rows = (
                {"trained": trained(self.model)}
                | self.table_rows()
                | {"learning rate": learning_rate(self.args), "answers end with": self._ends}
            )
            logger.info("%s", self.topology.table(self.unit, **rows))

    def _prepare_for_training(self, *arguments: Any, **keywords: Any) -> Any:
        if self.is_fsdp_enabled:
            # Before there is an optimizer: accelerate finds its weights' shards by their addresses, and weights on meta
            # have none
            shard(self.accelerator, self.model)
        prepared = super()._prepare_for_training(*arguments, **keywords)
        if self.topology.engine == "tp_fsdp":
            average_cut_adapter(self.model, self.accelerator)
        self.topology.verify(self.model_wrapped)
        gather_once(self.model_wrapped)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a folder that any program can load, of sharded weights too, of which transformers writes none.

        A checkpoint (`_internal_call`) keeps its shards beside it and gets what makes a model of them (`merge_shards`).
        """
        if not saves_shards(self.accelerator):
            super().save_model(output_dir, _internal_call)
        elif _internal_call:
            if self.args.should_save:
                save_without_weights(self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir)
                self.processing_class.save_pretrained(output_dir or self.args.output_dir)
        else:
            weights = self.accelerator.get_state_dict(self.model)  # whole, on rank 0, whatever the plugin's type
            self._save(output_dir, state_dict=weights)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dealt = self.dealing.sampler(len(self.train_dataset if train_dataset is None else train_dataset))
        return super()._get_train_sampler(train_dataset) if dealt is None else dealt

    def renew_card(self) -> None:
        folder = Path(self.args.output_dir)  # TRL writes it beside the checkpoints, and no manifest of theirs lists it
        if (folder / CARD).exists():
            self.create_model_card(model_name=folder.name)

    # Evaluation and logs

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        batch = self.held_out.once(self._prepare_inputs(inputs), self.rows, self._tp_size)
        with self.held_out.alone():
            loss, _, _ = super().prediction_step(model, batch.inputs, True)
        self.held_out.add_trls(loss, self._metrics["eval"], batch)
        return loss, None, None

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> Any:
        self.loss_sums.bring_back()
        return super()._run_epoch(*arguments, **keywords)

    def _finalize_training(self, *arguments: Any, **keywords: Any) -> Any:
        self.loss_sums.finish()
        return super()._finalize_training(*arguments, **keywords)
