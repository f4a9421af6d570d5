"""Train a policy on preference pairs with DPO, from a model or an SFT adapter."""

from tandem import contract
from tandem.options.parsing import parse
from tandem.options.training import PlanOptions
from tandem.training.option_sets import DPOOptionSet, check, check_there, classes, foreign


def main(argv: list[str]) -> None:
    *options, plan = parse(
        argv,
        (*classes(DPOOptionSet), PlanOptions),
        prog="dpo.py",
        description=__doc__,
        check=check,
        foreign=foreign(DPOOptionSet),
    )
    run = DPOOptionSet(*options)
    check_there(run)
    contract.check()
    if plan.plan:
        from tandem.training.plan import plan_run  # here, like run_dpo below, because it takes seconds to import

        print(plan_run(run, plan))
        return
    from tandem.training.stages import run_dpo

    run_dpo(run)
