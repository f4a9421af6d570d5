"""Fine-tune a model on the chosen answers, the step before DPO."""

from tandem import contract
from tandem.options.parsing import parse
from tandem.options.training import PlanOptions
from tandem.training.option_sets import SFTOptionSet, check, check_there, classes, foreign


def main(argv: list[str]) -> None:
    *options, plan = parse(
        argv,
        (*classes(SFTOptionSet), PlanOptions),
        prog="sft.py",
        description=__doc__,
        check=check,
        foreign=foreign(SFTOptionSet),
    )
    run = SFTOptionSet(*options)
    check_there(run)
    contract.check()
    if plan.plan:
        from tandem.training.plan import plan_run  # here, like run_sft below, because it takes seconds to import

        print(plan_run(run, plan))
        return
    from tandem.training.stages import run_sft

    run_sft(run)
