"""A minimal DPOTrainer of TRL that feeds the monitor, with a tiny random Llama: the contract of a real trainer."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tandem.monitor.callback import MonitorCallback
from tandem.monitor.gather import MicroBatch, Sampling
from tandem.monitor.monitor import Monitor
from tandem.monitor.options import MonitorOptions

VOCABULARY = 64


def pairs(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(7)

    def ids() -> list[int]:
        length = int(torch.randint(3, 9, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list([{"pair_id": f"p{i:02d}"} | {name: ids() for name in names} for i in range(count)])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


class Collator(DataCollatorForPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"pair_id": [example["pair_id"] for example in examples]}


class MonitoredTrainer(DPOTrainer):
    """`poison` are pairs whose loss is NaN; `die_in` is a step whose forward kills the run."""

    def __init__(
        self,
        folder: Path,
        options: MonitorOptions,
        *,
        n_pairs: int = 22,
        poison: tuple[str, ...] = (),
        die_in: int | None = None,
        **arguments: Any,
    ) -> None:
        arguments = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "save_steps": 4,
            "logging_steps": 3,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        } | arguments
        super().__init__(
            model=tiny_llama(),
            ref_model=tiny_llama(),
            args=DPOConfig(**arguments),
            train_dataset=pairs(n_pairs),
            processing_class=tokenizer(),
            data_collator=Collator(pad_token_id=2),
        )
        self.poison, self.die_in = poison, die_in
        self.monitor = Monitor(
            options,
            folder / "logs",
            self.accelerator,
            self.beta,
            save_checkpoint=lambda: self._save_checkpoint(self.model_wrapped, None),
            sampling=Sampling(epoch_pairs=len(self.train_dataset)),
        )
        self.add_callback(MonitorCallback(self))

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "pair_id"]))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.die_in == self.state.global_step + 1:
            raise KeyboardInterrupt
        inputs = dict(inputs)
        pair_ids = inputs.pop("pair_id")
        logps: list[torch.Tensor] = []
        hooks = [
            each.register_forward_hook(lambda *call: logps.append(call[-1].log_probs.detach().sum(dim=1)))
            for each in (self.model, self.ref_model)
        ]
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        for hook in hooks:
            hook.remove()
        if set(pair_ids) & set(self.poison):
            loss = loss * math.nan
            logps[0] = torch.where(torch.tensor([pair in self.poison for pair in pair_ids * 2]), torch.nan, logps[0])
        if self.model.training:
            (chosen, rejected), (ref_chosen, ref_rejected) = (both.chunk(2) for both in logps)
            micro_batch = MicroBatch.of(
                pair_ids,
                (chosen - rejected) - (ref_chosen - ref_rejected),
                (chosen, rejected),
                loss,
                kl=0.25 * ((chosen - ref_chosen) ** 2 + (rejected - ref_rejected) ** 2),
                tokens=inputs["attention_mask"].sum(),
                batch=lambda: inputs,
            )
            self.monitor.add(micro_batch)
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.accelerator.sync_gradients:
                self.monitor.collect(int(self.state.epoch or 0))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.monitor.add_grad_norm(grad_norm)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self.monitor.interval_logs())
        super().log(logs, start_time)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL writes one with every checkpoint, which takes longer than the rest of these runs."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.monitor.before_save(self.model)
        super()._save_checkpoint(model, trial)

    def resume(self, checkpoint: Path) -> None:
        self.monitor.load(checkpoint)
        self.train(resume_from_checkpoint=str(checkpoint))
