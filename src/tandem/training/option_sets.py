"""All options of a run of SFT or DPO: an instance of each option class of its command line.

Nothing heavy is imported here: the scripts parse these before anything loads.
"""

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tandem.data.options import DataOptions, SFTDataOptions
from tandem.data.sources import check_sources, may_hold_out, of_set
from tandem.errors import UserError
from tandem.monitor.options import MonitorOptions
from tandem.options.fields import names_of, refuse
from tandem.options.losses import DPOOptions
from tandem.options.migration import COUNTERPARTS, Counterpart
from tandem.options.model import LoraOptions, ModelOptions, TextOptions, check_folder, check_models, is_adapter
from tandem.options.training import EngineOptions, GaudiOptions, SFTOptions, TrainOptions, check_training
from tandem.runs import MANIFEST


class SFTOptionSet(NamedTuple):
    """The options of an SFT run."""

    model: ModelOptions
    lora: LoraOptions
    text: TextOptions
    data: SFTDataOptions
    train: SFTOptions
    gaudi: GaudiOptions


class DPOOptionSet(NamedTuple):
    """The options of a DPO run."""

    model: ModelOptions
    lora: LoraOptions
    text: TextOptions
    data: DataOptions
    train: TrainOptions
    dpo: DPOOptions
    engine: EngineOptions
    monitor: MonitorOptions
    gaudi: GaudiOptions


def classes(run: type[SFTOptionSet] | type[DPOOptionSet]) -> tuple[type, ...]:
    """The option classes of a run, for `options.parsing.parse`, in the order in which `run` takes their instances."""
    return tuple(typing.get_type_hints(run).values())


def foreign(run: type[SFTOptionSet] | type[DPOOptionSet]) -> dict[str, Counterpart]:
    """What becomes of options that this run does not have: those of other programs, and of the other stage."""
    other, script = (DPOOptionSet, "dpo.py") if run is SFTOptionSet else (SFTOptionSet, "sft.py")
    theirs, own = ({name for cls in classes(each) for name in names_of(cls)} for each in (other, run))
    return COUNTERPARTS | dict.fromkeys(theirs - own, Counterpart(told=f"it is one of scripts/{script}"))


def check(*options: Any) -> None:
    """Refuse, before anything is loaded, options of a run that do not go together; for `options.parsing.parse`.

    Args:
        options: instances of a run's `classes`, and perhaps others.

    Raises:
        UserError: naming all of them together.
    """
    given = {type(each): each for each in options}
    monitor, dpo = given.get(MonitorOptions), given.get(DPOOptions)
    data = given.get(SFTDataOptions) or given[DataOptions]
    train = given.get(SFTOptions) or given[TrainOptions]
    problems = []
    for conflict in (
        lambda: check_training(given[ModelOptions], given[LoraOptions], train, dpo),
        lambda: _check_held_out(train, data),
        lambda: monitor.check_beta(dpo.beta) if monitor and dpo else None,
        lambda: _check_cache(given.get(EngineOptions), dpo),
    ):
        try:
            conflict()
        except UserError as problem:
            problems.append(str(problem))
    refuse(problems)


def check_there(run: SFTOptionSet | DPOOptionSet) -> None:
    """Refuse paths at which there is no model or data, before anything is imported to read them.

    Nothing is refused of a run that has finished: what it was made from may be gone.

    Raises:
        UserError: naming all of them together.
    """
    if (Path(run.train.output_dir) / MANIFEST).exists():
        return
    name, reference = run.model.model_name_or_path, run.dpo.reference_model if isinstance(run, DPOOptionSet) else None
    tokenizer = run.model.tokenizer_name_or_path or name
    problems: dict[str, None] = {}
    data = [run.data, *(of_set(run.data, source) for _, source in run.train.named_sets)]
    checks: list[Callable[[], None]] = [functools.partial(check_sources, each) for each in data]
    for look in (
        lambda: None if is_adapter(tokenizer) else check_folder(tokenizer, "tokenizer_config.json"),
        lambda: check_models([name] if tokenizer != name or not problems else []),
        lambda: check_models([reference] if reference else []),
        *checks,
    ):
        try:
            look()
        except UserError as problem:
            problems[str(problem)] = None
    refuse(list(problems))


def _check_cache(engine: EngineOptions | None, dpo: DPOOptions | None) -> None:
    if engine is None or engine.ref_cache is None or dpo is None:
        return
    try:
        needed = dpo.needs_reference
    except UserError:  # an unknown loss, which DPOOptions itself reports
        return
    if not needed:
        raise UserError(f"--ref_cache has no effect with --loss_type {' '.join(dpo.loss_type)}, which has no reference")


def _check_held_out(train: TrainOptions, data: DataOptions) -> None:
    if train.eval_sets:
        if data.val_ratio:
            raise UserError("--val_ratio has no effect with --eval_sets, which are evaluated on instead")
    elif train.eval_strategy != "no" and not may_hold_out(data):
        raise UserError("--eval_strategy needs held-out pairs: a test split, or --val_ratio")
