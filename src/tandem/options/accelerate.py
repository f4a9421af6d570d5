"""Reads accelerate configs, for the plan and for the check before a pipeline."""

import dataclasses
from pathlib import Path

import yaml

from tandem.errors import UserError, one_line
from tandem.options.yaml_text import StrictLoader


@dataclasses.dataclass(frozen=True)
class AccelerateConfig:
    """What Tandem needs of an accelerate config.

    Attributes:
        kind: its `distributed_type`.
        processes: how many processes it starts.
        use_cpu: whether they train on the CPU though there is an accelerator.
        zero_stage: DeepSpeed's ZeRO stage; 0 without DeepSpeed.
    """

    kind: str = "NO"
    processes: int = 1
    use_cpu: bool = False
    zero_stage: int = 0


def read_accelerate_config(path: str | Path, option: str) -> AccelerateConfig:
    """The config in the file at `path`, which `option` names.

    Raises:
        UserError: it cannot be read, or is not a config that accelerate takes.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=StrictLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, UserError) as error:
        raise UserError(f"{option} {path}: cannot be read: {one_line(str(error))}") from error
    try:
        return AccelerateConfig(
            kind=str(values["distributed_type"]),
            processes=int(values.get("num_processes") or 1),
            use_cpu=bool(values.get("use_cpu")),
            zero_stage=int((values.get("deepspeed_config") or {}).get("zero_stage", 0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{option} {path}: not a config of accelerate ({error!r})") from error
