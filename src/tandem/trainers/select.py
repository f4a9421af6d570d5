"""Which trainers a run gets: TRL's, or optimum-habana's on Gaudi."""

import importlib.util
import os
from types import ModuleType

from tandem.errors import UserError
from tandem.log import logger

VARIABLE = "TANDEM_TRAINERS"


def builders() -> ModuleType:
    """The module whose `sft_trainer` and `dpo_trainer` build this run's trainer. Before any model is loaded.

    optimum-habana's on an HPU where it is installed; else TRL's, which on an HPU is experimental. `TANDEM_TRAINERS`
    (`gaudi` or `trl`) decides instead, so that optimum-habana's trainers can be tested on a CPU.

    Raises:
        UserError: `TANDEM_TRAINERS` is something else, or asks for optimum-habana where it is not installed.
    """
    name = os.environ.get(VARIABLE) or _default()
    if name not in ("gaudi", "trl"):
        raise UserError(f"{VARIABLE} must be gaudi or trl, not {name}")
    if name == "gaudi" and not _has_optimum_habana():
        raise UserError(f"{VARIABLE}=gaudi needs optimum-habana: see requirements-gaudi.txt")
    if name == "gaudi":
        from tandem.trainers import gaudi

        return gaudi
    from tandem.trainers import trl

    return trl


def _default() -> str:
    from tandem.models import has_hpu

    if not has_hpu():
        return "trl"
    if _has_optimum_habana():
        return "gaudi"
    logger.warning("HPU without optimum-habana: TRL's own trainers, static shapes; experimental (docs/gaudi.md)")
    return "trl"


def _has_optimum_habana() -> bool:
    return importlib.util.find_spec("optimum") is not None and importlib.util.find_spec("optimum.habana") is not None
