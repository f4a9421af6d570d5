"""Prepares what a run trains on: the token ids of its pairs (DPO) or examples (SFT), shared by all its processes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from datasets.table import InMemoryTable

from tandem.data.content import Content, data_content, tokenizer_content
from tandem.data.pairs import PairMaker
from tandem.data.prepare import HELD_OUT, TRAIN, Maker, Prepared, Rows, prepare
from tandem.data.rows import Row
from tandem.data.several import first_rows, trained_by
from tandem.data.sources import held_out_of, load_splits, load_training, of_set
from tandem.errors import UserError
from tandem.log import logger
from tandem.options.training import TrainOptions
from tandem.training.examples import ExampleMaker, packed
from tandem.training.groups import Groups, by_row
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.trainers.build import EVAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingData:
    """The data that a run trains and evaluates on.

    Attributes:
        splits: tokenized, by the trainer's argument names: `train_dataset`; if the run evaluates, `eval_dataset`, or an
            `eval_dataset.NAME` for each of `--eval_sets`. Their columns are memory-mapped.
        pairs: digest of the ids of the training pairs in their order, of those that are left out too.
        tokens: digest of all token ids.
    """

    splits: dict[str, Dataset]
    pairs: str
    tokens: str


def training_data(run: SFTOptionSet | DPOOptionSet, tokenizer: "PreTrainedTokenizerBase") -> TrainingData:
    """The data of a run.

    Raises:
        UserError: data that cannot be read, rendered or trained, or an evaluation without held-out pairs.
    """
    maker: Maker = ExampleMaker(tokenizer, run) if isinstance(run, SFTOptionSet) else PairMaker(tokenizer, run.text)
    rows = Rows(lambda: _read(run), lambda: _content(run))
    tokens = tokenizer_content(tokenizer)
    settings = None if tokens is None else [tokens, type(maker).__name__, maker.settings(), _limits(run.train)]
    prepared = prepare(rows, maker, settings, run.train)
    _tell(prepared, maker)
    splits = {name: Dataset(InMemoryTable(table)) for name, table in prepared.tables.items()}
    return TrainingData(splits, prepared.data, prepared.tokens)


def training_rows(run: SFTOptionSet | DPOOptionSet, tokenizer: "PreTrainedTokenizerBase") -> Dataset | Groups:
    """What the steps of a run draw from: for DPO, pairs grouped by row; for SFT, examples, packed if asked for.

    Raises:
        UserError: as `training_data`.
    """
    trained = training_data(run, tokenizer).splits[TRAIN]
    return packed(trained, run) if isinstance(run, SFTOptionSet) else by_row(trained)


def _limits(train: TrainOptions) -> tuple[int | None, int | None]:
    """The most rows to train on, and the most to evaluate."""
    return 32 if train.debug else train.max_train_samples, train.max_eval_samples


def _held_out_is_own(train: TrainOptions) -> bool:
    """Whether evaluation is on what the training data hold out, and not on sets of its own."""
    return train.eval_strategy != "no" and not train.eval_sets


def _read(run: SFTOptionSet | DPOOptionSet) -> dict[str, list[Row]]:
    evaluated: dict[str, list[Row]] = {}
    if _held_out_is_own(run.train):
        pairs, evaluated[HELD_OUT] = load_splits(run.data)
        if not evaluated[HELD_OUT]:
            raise UserError("--eval_strategy needs held-out pairs: a test split, --val_ratio, or --eval_sets")
    else:
        pairs = load_training(run.data)
        for name, source in run.train.named_sets:
            evaluated[f"{EVAL}{name}"] = held_out_of(of_set(run.data, source))
    most, most_evaluated = _limits(run.train)
    splits = {name: first_rows(held_out, most_evaluated) for name, held_out in evaluated.items()}
    return {name: trained_by(rows) for name, rows in {TRAIN: first_rows(pairs, most), **splits}.items()}


def _content(run: SFTOptionSet | DPOOptionSet) -> Content | None:
    parts = {TRAIN: data_content(run.data, training=True, held_out=_held_out_is_own(run.train))}
    if not _held_out_is_own(run.train):
        for name, source in run.train.named_sets:
            parts[f"{EVAL}{name}"] = data_content(of_set(run.data, source), training=False, held_out=True)
    told = {name: part.told for name, part in parts.items() if part is not None}
    size = sum(part.size for part in parts.values() if part is not None)
    return Content(told, size) if len(told) == len(parts) else None


def _tell(prepared: Prepared, maker: Maker) -> None:
    count = sum(map(len, prepared.tables.values()))
    logger.info("%d %ss: tokens %s", count, maker.what, "made" if prepared.is_new else "of an earlier run")
