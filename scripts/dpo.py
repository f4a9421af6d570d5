"""Train a policy on preference pairs with DPO, from a model or an SFT adapter."""

from tandem.config import parse
from tandem.data.options import DataOptions
from tandem.errors import script_main
from tandem.monitor.options import MonitorOptions
from tandem.options import (
    DPOOptions,
    EngineOptions,
    GaudiOptions,
    LoraOptions,
    ModelOptions,
    PlanOptions,
    TextOptions,
    TrainOptions,
    explain_unknown,
)

OPTIONS = (
    ModelOptions,
    LoraOptions,
    TextOptions,
    DataOptions,
    TrainOptions,
    DPOOptions,
    EngineOptions,
    MonitorOptions,
    GaudiOptions,
)


def main(argv: list[str]) -> None:
    *options, plan = parse(
        argv, (*OPTIONS, PlanOptions), prog="dpo.py", description=__doc__, explain_unknown=explain_unknown
    )
    if plan.plan:
        from tandem.plan import plan_dpo

        print(plan_dpo(*options[:7], plan))
        return
    from tandem.training import run_dpo  # after the options: importing TRL takes seconds

    run_dpo(*options)


if __name__ == "__main__":
    script_main(main)
