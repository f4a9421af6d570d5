"""Everything that a run of SFT or DPO is asked for: the option classes of its command line, one instance each.

Light to import: the scripts parse these before anything loads.
"""

import typing
from typing import NamedTuple

from tandem.data.options import DataOptions
from tandem.monitor.options import MonitorOptions
from tandem.options import (
    DPOOptions,
    EngineOptions,
    GaudiOptions,
    LoraOptions,
    ModelOptions,
    SFTOptions,
    TextOptions,
    TrainOptions,
)


class SFTRun(NamedTuple):
    """The options of an SFT run."""

    model: ModelOptions
    lora: LoraOptions
    text: TextOptions
    data: DataOptions
    train: SFTOptions
    gaudi: GaudiOptions


class DPORun(NamedTuple):
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


def classes(run: type[SFTRun] | type[DPORun]) -> tuple[type, ...]:
    """The option classes of a run, for `config.parse`, in the order in which `run` takes their instances."""
    return tuple(typing.get_type_hints(run).values())
