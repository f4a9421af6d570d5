"""Which trainers a run gets: TRL's, or optimum-habana's on Gaudi."""

import os

from tandem.errors import UserError
from tandem.log import logger
from tandem.models import habana
from tandem.objects import load_object
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import GaudiOptions, TrainOptions
from tandem.training.trainers.build import Builders
from tandem.training.trainers.gaudi_settings import check_gaudi

VARIABLE = "TANDEM_TRAINERS"


def builders(
    model: ModelOptions, lora: LoraOptions, train: TrainOptions, gaudi: GaudiOptions, dpo: DPOOptions | None = None
) -> Builders:
    """What builds the trainers of this run. Before any model is loaded.

    optimum-habana's on an HPU where it is installed; else TRL's, which on an HPU is experimental. `TANDEM_TRAINERS`
    (`gaudi`, `trl`, or `module:object` for builders of an accelerator of one's own) decides instead, so that
    optimum-habana's trainers can be tested on a CPU.

    Raises:
        UserError: an option that they do not have; `TANDEM_TRAINERS` is something else, or asks for optimum-habana
            where it is not installed.
    """
    name = os.environ.get(VARIABLE) or _default()
    if ":" in name:
        own: Builders = load_object(name, VARIABLE)
        return own
    if name not in ("gaudi", "trl"):
        raise UserError(f"{VARIABLE} must be gaudi, trl or module:object, not {name}")
    if name == "gaudi":
        check_gaudi(model, lora, train, dpo, lazy=habana.is_lazy())
        if not habana.has_optimum_habana():
            raise UserError(f"{VARIABLE}=gaudi needs optimum-habana: see requirements-gaudi.txt")
        habana.prepare()
        from tandem.training.trainers import gaudi as on_gaudi

        return on_gaudi
    if asked := gaudi.asked():
        raise UserError(f"--{asked[0]} is of optimum-habana's trainers on Intel Gaudi, which this run does not use")
    from tandem.devices import has_mps
    from tandem.training.trainers import trl
    from tandem.training.trainers.mps_settings import check_mps

    if has_mps() and not train.use_cpu:
        check_mps(model, lora, train, os.environ)
    return trl


def _default() -> str:
    from tandem.devices import has_hpu

    if not has_hpu():
        return "trl"
    if habana.has_optimum_habana():
        return "gaudi"
    logger.warning("HPU without optimum-habana: TRL's own trainers, static shapes; experimental (docs/gaudi.md)")
    return "trl"
