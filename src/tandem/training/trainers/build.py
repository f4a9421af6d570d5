"""What a run hands to those who build its trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tandem.training.option_sets import DPOOptionSet, SFTOptionSet

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVAL = "eval_dataset."
"""Begins the name of a split that is evaluated on beside others."""

R = TypeVar("R", SFTOptionSet, DPOOptionSet)


@dataclass(frozen=True)
class Build(Generic[R]):
    """All that a trainer is built from.

    Attributes:
        run: the options.
        policy: the model to be trained, whole or with the adapter that is trained on.
        tokenizer: its tokenizer.
        arguments: those of transformers' TrainingArguments.
        splits: `train_dataset`, and where the run evaluates `eval_dataset`, or `EVAL` and the name of each of several.
            Tokenized examples (SFT) or pairs (DPO).
        logs_dir: folder of a DPO run's logs.
        reference: of a DPO run; None: it is the policy as it is now.
    """

    run: R
    policy: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    arguments: dict[str, Any]
    splits: "dict[str, Dataset]"
    logs_dir: Path = Path()
    reference: "PreTrainedModel | None" = None

    @property
    def datasets(self) -> dict[str, Any]:
        """The splits by the trainer's argument names; several to evaluate on are a dict."""
        named = {name.removeprefix(EVAL): each for name, each in self.splits.items() if name.startswith(EVAL)}
        whole = {name: each for name, each in self.splits.items() if not name.startswith(EVAL)}
        return whole | ({"eval_dataset": named} if named else {})


class Builders(Protocol):
    """What `trainers.trl` and `trainers.gaudi` offer."""

    def start_processes(self, arguments: Mapping[str, Any]) -> object:
        """Bring the processes of this run together. Before a model is loaded; the caller keeps what this gives as long
        as models are."""

    def sft_trainer(self, build: Build[SFTOptionSet]) -> Any:
        """The trainer of tokenized examples, prompt + completion."""

    def dpo_trainer(self, build: Build[DPOOptionSet]) -> Any:
        """The trainer of tokenized pairs."""
