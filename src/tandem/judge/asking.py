"""Asks the judge, round after round, for all verdicts that are missing, until they are there or given up."""

import asyncio
import collections
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from tandem.errors import UserError
from tandem.judge.admission import Admission, OverBudget
from tandem.judge.backends.base import Backend
from tandem.judge.log import VerdictLog, guessed_tokens, lost, tokens_of
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call

PILOT = 10  # calls that are asked first; if none of them gets a verdict, the rest are not asked
REQUESTS_PER_CALL = 2  # requests, each with its own retries, after whose failure a call is given up


def worst_cost(options: JudgeOptions, call: Call) -> float:
    """The most that a call may cost; 0 where no prices are given."""
    return options.cost(guessed_tokens(call), options.max_output_tokens) or 0.0


async def ask_all(
    options: JudgeOptions,
    pilot: Backend,
    backend: Backend,
    admission: Admission,
    calls: Mapping[str, Call],
    log: VerdictLog,
) -> None:
    """Ask all calls that have no verdict, in up to --max_attempts rounds.

    A call that the judge refused is asked again, and so, once, is one whose request failed in spite of the openai
    package's retries: a run that goes on after an interruption would do the same, and the summary must not depend on
    whether it was interrupted. The first calls go to `pilot`; the rest go to `backend`, if one of the first got its
    verdict.

    Raises:
        UserError: no further request can succeed, the judge gives no verdicts, or --max_cost is reached.
    """
    failures: collections.Counter[str] = collections.Counter()
    with tqdm(total=len(calls), initial=sum(map(log.is_ok, calls.values())), desc="judge", unit="verdict") as progress:

        async def ask(asked: Backend, call: Call) -> None:
            async with admission.request(worst_cost(options, call)):
                reply = await asked.ask(call)
                if reply.body is None:
                    log.add_error(call, reply.error)
                    failures[call.key] += asked.retries  # a backend that does not retry leaves that to the rounds
                    return
                reading = log.add_reply(call, reply.body)
                admission.spend(options.cost(*tokens_of(call, reply.body, reading)) or 0.0)
                progress.update(reading.status == "ok")

        async def ask_part(asked: Backend, part: Sequence[Call]) -> None:
            if part:
                await asked.expect(part)
                await _in_parallel([ask(asked, call) for call in part], options.max_concurrency)
                refuse_unusable(options, calls.values(), log)

        refuse_unusable(options, calls.values(), log)
        first = 0 if any(map(log.is_judged, calls.values())) else PILOT
        for _ in range(options.max_attempts):
            pending = [
                call for call in calls.values() if log.may_be_asked(call) and failures[call.key] < REQUESTS_PER_CALL
            ]
            if not pending:
                break
            try:
                await ask_part(pilot, pending[:first])
                await ask_part(backend, pending[first:])
                first = 0
            except OverBudget:
                raise UserError(
                    f"stopped before --max_cost {options.max_cost:g}: {log.usage()['cost']:.4g} spent, "
                    f"{sum(map(log.is_ok, calls.values()))} of {len(calls)} verdicts; the same command with a higher "
                    "--max_cost goes on"
                ) from None


async def _in_parallel(tasks: list, limit: int) -> None:
    """Run coroutines, `limit` at a time. After an error those that run are finished, and no more are begun.

    Raises:
        Exception: the first of those that were raised, a `UserError` before others.
    """
    waiting = iter(tasks)

    async def worker() -> None:
        nonlocal waiting
        while (task := next(waiting, None)) is not None:
            try:
                await task
            except BaseException:
                left, waiting = waiting, iter(())
                for each in left:
                    each.close()
                raise

    outcomes = await asyncio.gather(*(worker() for _ in range(min(limit, len(tasks)))), return_exceptions=True)
    raise_first(outcomes)


def raise_first(outcomes: Iterable[BaseException | None]) -> None:
    """Raise the first error that ended a worker, if any; a `UserError` goes before others."""
    errors = [outcome for outcome in outcomes if outcome is not None]
    for error in sorted(errors, key=lambda one: not isinstance(one, UserError)):
        raise error


def refuse_unusable(options: JudgeOptions, calls: Iterable[Call], log: VerdictLog) -> None:
    """Stop if the judge was asked `PILOT` calls or more and has given no verdict at all.

    Raises:
        UserError: with the most frequent reason, and what to do about it.
    """
    calls = list(calls)
    if any(map(log.is_judged, calls)):
        return
    ends = lost(calls, log)
    asked = sum(count for _, _, count in ends)
    if asked < PILOT:
        return
    status, reason, count = ends[0]
    mend = {
        "incomplete": f"raise --max_output_tokens, now {options.max_output_tokens}",
        "error": f"raise --timeout, now {options.timeout:g}" if "Timeout" in reason else "see what its server says",
        "refusal": "take another --judge_model",
    }.get(status, "take another --judge_model, or a server that enforces JSON schemas")
    raise UserError(
        f"the judge {options.judge_model} gave no verdict on any of the first {asked} calls; on {count} of them: "
        f"{status} ({reason}): {mend}"
    )
