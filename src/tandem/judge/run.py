"""The judge from end to end: plans the calls, asks them, and writes verdicts and summary."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from tandem import ranks
from tandem.errors import UserError
from tandem.judge import calibration
from tandem.judge.admission import Admission
from tandem.judge.asking import ask_all, worst_cost
from tandem.judge.backends.base import Backend
from tandem.judge.backends.batch import BatchBackend
from tandem.judge.backends.server import ServerBackend, client_of, enforces_schema
from tandem.judge.labels import read_labels, write_page
from tandem.judge.log import VerdictLog, guessed_tokens
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Comparison, Judge
from tandem.judge.summary import Plan, summarise, winners
from tandem.objects import load_object, version_of
from tandem.runs import locked, write_json
from tandem.servers.client import AsyncClient

SERVER_FILE = "server.json"


def judge(options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]) -> dict[str, Any]:
    """Have every comparison judged in both orders, after a test of the judge on `labelled` ones; returns the summary.

    Writes to `options.folder`: `label.html` (asks people about some of the pairs), `server.json` (what was found out
    about the server), `raw.jsonl` (every reply, before it is read), `verdicts.jsonl` (a line an attempt), `usage.json`
    (what all attempts cost), `winners.json` (who won each prompt, with the keys of its verdicts), and with --batch
    `batches.jsonl`. Beside that folder it writes `judge_summary.json`, which depends on the verdicts alone, and not on
    how often the run was interrupted. The same call again asks only what has no verdict yet.

    Args:
        options: with `dry_run`, nothing is asked or written, and the estimate is returned instead
        comparisons: side 2 is the model to be judged; all have the same two labels
        labelled: side 2 is the answer that people chose (`calibration.labelled_comparisons`)

    Raises:
        UserError: there is nothing to judge, the server cannot be used, --max_cost is reached, or another process
            judges in the same folder.
    """
    ranks.refuse_several("judge")
    if not comparisons:
        raise UserError("there is nothing to judge: no prompt was answered by both models")
    if options.human_labels is not None:
        read_labels(options.human_labels, comparisons)  # a fault in the file is told before anything costs money
    if options.dry_run:
        return dry_run(options, comparisons, labelled)
    with locked(options.folder):
        judge, plan, log, asked = gather(options, comparisons, labelled)
        if options.label_pairs:  # only now, so that a server that cannot be used leaves no files
            write_page(options.folder, comparisons, options.label_pairs, options.seed)
        summary = summarise(options, judge, plan, log, asked)
        write_json(options.folder / "winners.json", winners(plan["main"], log))
        write_json(options.folder / "usage.json", log.usage())
        write_json(options.summary_file, summary)
    return summary


def gather(
    options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]
) -> tuple[Judge, Plan, VerdictLog, dict[str, Any]]:
    """Ask all that has no verdict yet; the caller holds the lock of `options.folder`.

    Returns the judge, all calls, the log with the verdicts, and how the server was asked (`Endpoint.state`).

    Raises:
        UserError: see `judge`.
    """
    log = VerdictLog(options)
    judge, plan, asked = asyncio.run(_have_judged(options, comparisons, labelled, log))
    return judge, plan, log, asked


def dry_run(options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]) -> dict[str, Any]:
    """What `judge` would ask, and its cost at most; nothing is asked or written."""
    return _dry_run(options, comparisons, labelled, VerdictLog(options))


def _plan(
    options: JudgeOptions, judge: Judge, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]
) -> Plan:
    """All calls, in the order in which they are asked: those that test the judge come first."""
    return {
        "labelled": judge.calls("labelled", labelled, options.samples),
        "self": judge.calls("self", calibration.self_comparisons(comparisons, options.self_pairs), options.samples),
        "main": judge.calls("main", comparisons, options.samples),
    }


def _judge_of(options: JudgeOptions, schema_enforced: bool) -> Judge:
    code = version_of(options.judge_backend) if options.judge_backend else None
    return Judge(
        options.url, options.judge_model, schema_enforced, options.temperature, options.max_output_tokens, code
    )


def _known_server(options: JudgeOptions) -> dict[str, Any] | None:
    """What an earlier run found out about the server: `schema_enforced`, and how it is asked.

    It is kept because each call's key depends on it: if another probe gave another result by chance, everything would
    be judged anew.
    """
    file = options.folder / SERVER_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        same = (known["base_url"], known["model"]) == (options.url, options.judge_model)
        sampling = _judge_of(options, True).sampling
        same = same and known.get("sampling", sampling) == sampling
        return known | {"schema_enforced": bool(known["schema_enforced"])} if same else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to have the server probed again") from error


async def _have_judged(
    options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison], log: VerdictLog
) -> tuple[Judge, Plan, dict[str, Any]]:
    left = None
    if options.max_cost is not None:
        left = options.max_cost - (log.usage()["cost"] or 0.0)
    admission = Admission(options.max_concurrency, left)
    if options.judge_backend is not None:
        own: Backend = load_object(options.judge_backend, "--judge_backend")(options)
        judge = _judge_of(options, schema_enforced=False)
        log.lenient = True
        plan = _plan(options, judge, comparisons, labelled)
        calls = _calls_of(plan, log)
        await ask_all(options, own, own, admission, calls, log)
        return judge, plan, {}
    known = _known_server(options)
    client = client_of(options, (known or {}).get("asked"), admission.too_many_requests)
    async with client.openai:
        judge = await _probed(options, client, known)
        log.lenient = not judge.schema_enforced
        plan = _plan(options, judge, comparisons, labelled)
        calls = _calls_of(plan, log)
        client.has_answered = client.has_answered or any(map(log.is_judged, calls.values()))
        await _ask(options, judge, client, admission, calls, log)
    return judge, plan, client.endpoint.state


def _calls_of(plan: Plan, log: VerdictLog) -> dict[str, Call]:
    """All calls by key. Replies that earlier runs left unread are read, and ties without asking are written down."""
    calls = {call.key: call for part in plan.values() for call in part}
    log.recover(calls)
    for call in calls.values():
        if call.free and not log.is_ok(call):
            log.add_tie(call)
    return calls


async def _ask(
    options: JudgeOptions,
    judge: Judge,
    client: AsyncClient,
    admission: Admission,
    calls: Mapping[str, Call],
    log: VerdictLog,
) -> None:
    single = ServerBackend(client, judge)
    if not options.batch:
        return await ask_all(options, single, single, admission, calls, log)

    def afford(asked: Sequence[Call]) -> None:
        admission.check(sum(worst_cost(options, call) for call in asked))

    batch = BatchBackend(client, judge, options.folder, afford)
    try:
        await ask_all(options, single, batch, admission, calls, log)
    except UserError:
        batch.settle()  # the replies of its batches are written down already
        raise
    batch.settle()


async def _probed(options: JudgeOptions, client: AsyncClient, known: Mapping[str, Any] | None) -> Judge:
    enforced = None if known is None else known["schema_enforced"]
    if enforced is None:
        enforced, replies = await enforces_schema(client, _judge_of(options, True))
        if enforced is None:  # every probe reached the limit of tokens, so that there is nothing to remember
            return _judge_of(options, True)
        judge = _judge_of(options, enforced)
        found = {"base_url": judge.base_url, "model": judge.model, "schema_enforced": enforced}
        found |= {"sampling": judge.sampling, "asked": client.endpoint.state, "replies": replies}
        write_json(options.folder / SERVER_FILE, found)
    if not enforced:
        tqdm.write(
            f"judge: {options.url} does not enforce JSON schemas; verdicts are asked for as plain JSON with "
            "worked examples, and checked here",
            file=sys.stderr,
        )
    return _judge_of(options, enforced)


def _dry_run(
    options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison], log: VerdictLog
) -> dict[str, Any]:
    """See `dry_run`. Until the server was probed, prompts are counted with worked examples, their longest form."""
    known = _known_server(options) or {"schema_enforced": False}
    plan = _plan(options, _judge_of(options, known["schema_enforced"]), comparisons, labelled)
    calls = {call.key: call for part in plan.values() for call in part}
    pending = [call for call in calls.values() if not log.is_ok(call) and not call.free]
    input_tokens, output_tokens = sum(map(guessed_tokens, pending)), len(pending) * options.max_output_tokens
    return {
        "dry_run": True,
        "verdicts": {kind: len(part) for kind, part in plan.items()},
        "identical": sum(call.free for call in calls.values()),
        "judged_already": sum(log.is_ok(call) and not call.free for call in calls.values()),
        "to_ask": len(pending),
        "input_tokens": input_tokens,
        "output_tokens_at_most": output_tokens,
        "cost_at_most": options.cost(input_tokens, output_tokens),
    }
