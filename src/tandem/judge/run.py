"""The judge from end to end: what to ask, asking it, what was said, what follows from it."""

import asyncio
import collections
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tandem import ranks
from tandem.data.held_out import CHOSEN, chosen_answers
from tandem.errors import UserError
from tandem.intervals import Array
from tandem.judge import calibration, statistics, verdicts
from tandem.judge.client import Admission, Client, OverBudget
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import PROMPT_VERSION, Call, Comparison, Judge, Kind
from tandem.judge.verdicts import ORDERS, Reading
from tandem.runs import append_jsonl, locked, read_jsonl, write_json

BYTES_PER_TOKEN = 3  # few texts have fewer: token counts guessed with it are rather too high
SERVER_FILE = "server.json"
PILOT = 10  # calls, the labelled ones first, of which one at least must get its verdict before the rest are asked
REQUESTS_PER_CALL = 2  # that may fail for good, each after its own retries

Plan = dict[Kind, list[Call]]


def judge(options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]) -> dict[str, Any]:
    """Have every comparison judged in both orders, after trying the judge on `labelled` ones; returns the summary.

    In `options.folder`: `server.json` (whether the server enforces schemas), `raw.jsonl` (every reply, before it is
    read), `verdicts.jsonl` (a line an attempt), `usage.json` (what all attempts cost), `winners.json`
    (who won each prompt), `batches.jsonl` with --batch.
    Beside that folder: `judge_summary.json`, which depends on the verdicts alone and not on how often the run was
    interrupted. The same call again asks only for what has no verdict yet.

    Args:
        options: with `dry_run`, nothing is asked or written and the estimate is returned instead
        comparisons: side 2 is the model to be judged, the same labels throughout
        labelled: side 2 is the answer that people chose (`calibration.labelled_comparisons`)

    Raises:
        UserError: nothing to judge, the server cannot be used, --max_cost is reached, or another judge is at work in
            the folder.
    """
    ranks.refuse_several("judge")
    if not comparisons:
        raise UserError("there is nothing to judge: no prompt was answered by both models")
    if options.dry_run:
        return _dry_run(options, comparisons, labelled, VerdictLog(options))
    with locked(options.folder):
        log = VerdictLog(options)
        judge, plan = asyncio.run(_have_judged(options, comparisons, labelled, log))
        _say_lost(plan, log)
        summary = summarise(options, judge, plan, log)
        write_json(options.folder / "winners.json", winners(plan["main"], log))
        write_json(options.folder / "usage.json", log.usage())
        write_json(options.summary_file, summary)
    return summary


def load_comparisons(options: JudgeOptions, pairs: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The answers of both generation files, joined by prompt; a prompt that occurs twice counts once.

    Labels are what stands after `generations_` in the files' names. With `--against chosen` side 1 is the answer that
    people chose in the held-out `pairs`.

    Raises:
        UserError: a file is missing or damaged, or the sides answer different prompts.
    """
    file_1, file_2 = options.generation_files
    if options.run_dir is not None and options.against == CHOSEN:
        return _against_chosen(file_2, options.policy, chosen_answers(pairs))
    rows_1, rows_2 = _generations(file_1), _generations(file_2)
    if differing := rows_1.keys() ^ rows_2.keys():
        raise UserError(f"{file_1} and {file_2}: {len(differing)} prompts are in one only; generate both on the same")
    label_1, label_2 = (file.name.split(".")[0].removeprefix("generations_") for file in (file_1, file_2))
    return [
        Comparison(key, row["messages"], row["text"], rows_2[key]["text"], label_1, label_2)
        for key, row in rows_1.items()
    ]


def _against_chosen(file: Path, label: str, chosen: Mapping[str, str]) -> list[Comparison]:
    rows = _generations(file)
    if missing := rows.keys() - chosen.keys():
        raise UserError(f"{file}: {len(missing)} prompts are none of the held-out pairs; name those they are from")
    return [Comparison(key, row["messages"], chosen[key], row["text"], CHOSEN, label) for key, row in rows.items()]


def _generations(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; generate answers first")
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(_read_log(file), start=1):
        for field, kind in (("prompt_id", str), ("messages", list), ("text", str)):
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise UserError(f"{file} line {number}: {field} is missing or not a {kind.__name__}")
        rows.setdefault(row["prompt_id"], row)
    return rows


def _read_log(file: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(file)
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); move it away, or restore it") from error


class VerdictLog:
    """raw.jsonl and verdicts.jsonl: what was said so far, and where it is written down."""

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._raw_file = options.folder / "raw.jsonl"
        self._verdict_file = options.folder / "verdicts.jsonl"
        self._ok: dict[str, dict[str, Any]] = {}
        self._last: dict[str, dict[str, Any]] = {}
        self._attempts: collections.Counter[str] = collections.Counter()
        self._used: collections.Counter[str] = collections.Counter()
        self.lenient = False  # how replies are read: True for a server that enforces no schema
        for number, record in enumerate(_read_log(self._verdict_file), start=1):
            try:
                self._remember(record)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self._verdict_file} line {number}: not a verdict ({error!r}); move the file away, or restore it"
                ) from error

    def _remember(self, record: dict[str, Any]) -> None:
        key = record["key"]
        self._last[key] = record
        self._attempts[key] = max(self._attempts[key], record["attempt"])
        self._used.update(
            replies=1, input_tokens=record["input_tokens"] or 0, output_tokens=record["output_tokens"] or 0
        )
        if record["status"] == "ok":
            self._ok.setdefault(key, record)

    def is_ok(self, call: Call) -> bool:
        """Whether the call has its verdict and need not be asked again."""
        return call.key in self._ok

    def is_judged(self, call: Call) -> bool:
        """Whether the judge itself gave the call its verdict."""
        return self.is_ok(call) and not call.free

    def may_be_asked(self, call: Call) -> bool:
        """Whether to ask for the verdict; a reply that met the limit of tokens would meet the same limit again."""
        return self.status(call) not in ("ok", "incomplete")

    def verdict(self, call: Call) -> dict[str, Any] | None:
        """The line with the call's verdict."""
        return self._ok.get(call.key)

    def status(self, call: Call) -> str:
        """ok, or the status of the last attempt; `not_asked` if there was none."""
        record = self._ok.get(call.key) or self._last.get(call.key)
        return record["status"] if record else "not_asked"

    def detail(self, call: Call) -> str:
        """What the last attempt says of itself, where the call has no verdict."""
        return (self._last.get(call.key) or {"detail": ""})["detail"]

    def usage(self) -> dict[str, Any]:
        """Tokens and cost of all attempts, those of earlier runs too; requests that failed have no known tokens."""
        tokens = self._used["input_tokens"], self._used["output_tokens"]
        return {
            "replies": self._used["replies"],
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
            "cost": self._options.cost(*tokens),
        }

    def add_reply(self, call: Call, body: str) -> Reading:
        """Write the reply down, then read it."""
        attempt = self._attempts[call.key] + 1
        append_jsonl(self._raw_file, {"key": call.key, "attempt": attempt, "body": body})
        return self._add_body(call, attempt, body)

    def _add_body(self, call: Call, attempt: int, body: str) -> Reading:
        reading = verdicts.read_reply(body, lenient=self.lenient)
        self._add(call, attempt, reading, _tokens(call, body, reading))
        return reading

    def add_error(self, call: Call, detail: str) -> None:
        """Write down that there was no reply."""
        self._add(call, self._attempts[call.key] + 1, Reading("error", detail=detail), (0, 0))

    def add_tie(self, call: Call) -> None:
        """Write down the verdict on identical answers, which nobody needs to be asked for."""
        self._add(call, 0, Reading("ok", "tie", detail="identical answers"), (0, 0))

    def _add(self, call: Call, attempt: int, reading: Reading, tokens: tuple[int, int]) -> None:
        record = call.identity | {
            "attempt": attempt,
            "status": reading.status,
            "verdict": reading.verdict,
            "rationale": reading.rationale,
            "detail": reading.detail,
            "input_tokens": tokens[0],
            "output_tokens": tokens[1],
        }
        append_jsonl(self._verdict_file, record)
        self._remember(record)

    def recover(self, by_key: Mapping[str, Call]) -> None:
        """Read replies that a killed run wrote down and had no time to read."""
        for record in _read_log(self._raw_file):
            call = by_key.get(record["key"])
            if call is not None and record["attempt"] > self._attempts[call.key] and not self.is_ok(call):
                self._add_body(call, record["attempt"], record["body"])


def _tokens(call: Call, body: str, reading: Reading) -> tuple[int, int]:
    """Tokens as the server counts them, else a guess, so that --max_cost also holds where it counts none."""
    if reading.input_tokens is not None and reading.output_tokens is not None:
        return reading.input_tokens, reading.output_tokens
    return _guess(call), len(body.encode()) // BYTES_PER_TOKEN


def _guess(call: Call) -> int:
    return sum(len(message["content"].encode()) for message in call.messages) // BYTES_PER_TOKEN + 1


def _plan(
    options: JudgeOptions, judge: Judge, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]
) -> Plan:
    """All calls, in the order in which they are asked: whether the judge can judge comes first."""
    return {
        "labelled": judge.calls("labelled", labelled, options.samples),
        "self": judge.calls("self", calibration.self_comparisons(comparisons, options.self_pairs), options.samples),
        "main": judge.calls("main", comparisons, options.samples),
    }


def _judge_of(options: JudgeOptions, schema_enforced: bool) -> Judge:
    return Judge(options.base_url, options.judge_model, schema_enforced, options.temperature, options.max_output_tokens)


def _known_server(options: JudgeOptions) -> bool | None:
    """Whether the server enforces schemas, if an earlier run found out.

    It is kept since the form of the question is part of each call's key: an answer that changed with the probe's luck
    would have everything judged anew.
    """
    file = options.folder / SERVER_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        same = (known["base_url"], known["model"]) == (options.base_url, options.judge_model)
        sampling = _judge_of(options, True).sampling
        same = same and known.get("sampling", sampling) == sampling
        return bool(known["schema_enforced"]) if same else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to have the server probed again") from error


async def _have_judged(
    options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison], log: VerdictLog
) -> tuple[Judge, Plan]:
    left = None
    if options.max_cost is not None:
        left = options.max_cost - log.usage()["cost"]
    admission = Admission(options.max_concurrency, left)
    async with Client(options, admission) as client:
        judge = await _probed(options, client)
        log.lenient = not judge.schema_enforced
        plan = _plan(options, judge, comparisons, labelled)
        calls = {call.key: call for part in plan.values() for call in part}
        log.recover(calls)
        client.has_answered = client.has_answered or any(map(log.is_judged, calls.values()))
        for call in calls.values():
            if call.free and not log.is_ok(call):
                log.add_tie(call)
        await _ask(options, judge, client, calls, log)
    return judge, plan


async def _probed(options: JudgeOptions, client: Client) -> Judge:
    enforced = _known_server(options)
    if enforced is None:
        enforced, replies = await client.enforces_schema(_judge_of(options, True))
        if enforced is None:  # every probe met the limit of tokens, which shows nothing to be remembered
            return _judge_of(options, True)
        judge = _judge_of(options, enforced)
        found = {"base_url": judge.base_url, "model": judge.model, "schema_enforced": enforced}
        write_json(options.folder / SERVER_FILE, found | {"sampling": judge.sampling, "replies": replies})
    if not enforced:
        tqdm.write(
            f"judge: {options.base_url} does not enforce JSON schemas; verdicts are asked for as plain JSON with "
            "worked examples, and checked here",
            file=sys.stderr,
        )
    return _judge_of(options, enforced)


async def _ask(options: JudgeOptions, judge: Judge, client: Client, calls: Mapping[str, Call], log: VerdictLog) -> None:
    """Rounds over all calls without a verdict, up to --max_attempts.

    Refusals are asked again as well, and requests that failed in spite of the openai package's own retries once more: a
    run that was interrupted asks them again anyway, and the summary must not depend on that.
    """
    failures: collections.Counter[str] = collections.Counter()
    with tqdm(total=len(calls), initial=sum(map(log.is_ok, calls.values())), desc="judge", unit="verdict") as progress:

        def on_reply(call: Call, body: str) -> None:
            if log.is_ok(call):
                return  # a batch that was being collected when the run was killed
            reading = log.add_reply(call, body)
            client.admission.spend(options.cost(*_tokens(call, body, reading)) or 0.0)
            progress.update(reading.status == "ok")

        def on_error(call: Call, detail: str) -> None:
            log.add_error(call, detail)
            if not options.batch:  # where nobody has retried it yet
                failures[call.key] += 1

        def worst_cost(call: Call) -> float:
            return options.cost(_guess(call), options.max_output_tokens) or 0.0

        refuse_unusable(options, calls.values(), log)
        pilot = 0 if any(map(log.is_judged, calls.values())) else PILOT
        if options.batch:
            await client.collect_batches(dict(calls), options.folder, on_reply, on_error)
        for _ in range(options.max_attempts):
            pending = [
                call for call in calls.values() if log.may_be_asked(call) and failures[call.key] < REQUESTS_PER_CALL
            ]
            if not pending:
                break
            try:
                if options.batch:
                    await client.ask_batch(judge, pending, worst_cost, options.folder, on_reply, on_error)
                else:
                    # A judge that gives no verdict on the first few calls is not asked for the rest
                    for part in (pending[:pilot], pending[pilot:]):
                        await client.ask_all(judge, part, worst_cost, on_reply, on_error)
                        refuse_unusable(options, calls.values(), log)
            except OverBudget:
                raise UserError(
                    f"stopped before --max_cost {options.max_cost:g}: {log.usage()['cost']:.4g} spent, "
                    f"{sum(map(log.is_ok, calls.values()))} of {len(calls)} verdicts; the same command with a higher "
                    "--max_cost goes on"
                ) from None


def lost(calls: Iterable[Call], log: VerdictLog) -> list[tuple[str, str, int]]:
    """Status, reason and number of the calls that were asked and have no verdict, the commonest first."""
    ends = collections.Counter(
        (log.status(call), log.detail(call)) for call in calls if log.status(call) not in ("ok", "not_asked")
    )
    return [(status, reason, count) for (status, reason), count in ends.most_common()]


def refuse_unusable(options: JudgeOptions, calls: Iterable[Call], log: VerdictLog) -> None:
    """Stop where the judge has given no verdict on `PILOT` calls or more.

    Raises:
        UserError: the commonest reason, and what mends it.
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
        "error": "see what its server says",
        "refusal": "take another --judge_model",
    }.get(status, "take another --judge_model, or a server that enforces JSON schemas")
    raise UserError(
        f"the judge {options.judge_model} gave no verdict on any of the first {asked} calls; on {count} of them: "
        f"{status} ({reason}): {mend}"
    )


def _say_lost(plan: Plan, log: VerdictLog) -> None:
    ends = lost({call.key: call for part in plan.values() for call in part}.values(), log)
    if ends:
        reasons = "; ".join(f"{count} {status} ({reason})" for status, reason, count in ends[:5])
        tqdm.write(f"judge: no verdict on {sum(count for _, _, count in ends)} calls: {reasons}", file=sys.stderr)


def _dry_run(
    options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison], log: VerdictLog
) -> dict[str, Any]:
    """What the run would ask, at most; before the server is known, prompts count with their worked examples."""
    plan = _plan(options, _judge_of(options, bool(_known_server(options))), comparisons, labelled)
    calls = {call.key: call for part in plan.values() for call in part}
    pending = [call for call in calls.values() if not log.is_ok(call) and not call.free]
    input_tokens, output_tokens = sum(map(_guess, pending)), len(pending) * options.max_output_tokens
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


def summarise(options: JudgeOptions, judge: Judge, plan: Plan, log: VerdictLog) -> dict[str, Any]:
    """judge_summary.json, from the verdicts alone."""
    votes = {kind: _votes(calls, log) for kind, calls in plan.items()}
    labelled = calibration.agreement(*votes["labelled"])
    result = statistics.summarise(*votes["main"], seed=options.seed)
    first = plan["main"][0].comparison
    return {
        **calibration.conclude(result, labelled, first.label_1, first.label_2, options.max_flip_rate),
        "judge": {
            "model": judge.model,
            "base_url": judge.base_url,
            "prompt_version": PROMPT_VERSION,
            "schema_enforced": judge.schema_enforced,
            "sampling": judge.sampling,
            "samples": options.samples,
        },
        "labels": {"side_1": first.label_1, "side_2": first.label_2},
        "calibration": {
            "labelled": labelled,
            "self_vs_self": calibration.self_agreement(votes["self"][0], votes["self"][3]),
            "max_flip_rate": options.max_flip_rate,
        },
        "result": result,
        "accounting": {kind: _accounting(calls, log) for kind, calls in plan.items()},
        "tokens_of_verdicts": _tokens_of_verdicts(plan, log),
    }


def winners(calls: Iterable[Call], log: VerdictLog) -> list[dict[str, str]]:
    """A row for each prompt: `prompt_id` and `winner_model_vs_<side 1>`.

    The winner is `model` (side 2), the label of side 1 or `tie`, if both orders say so; else `disagree` or `unjudged`.
    """
    said: dict[int, list[dict[str, Any]]] = {}
    comparisons: dict[int, Comparison] = {}
    for call in calls:
        comparisons[id(call.comparison)] = call.comparison
        found = said.setdefault(id(call.comparison), [])
        if record := log.verdict(call):
            found.append(record)
    rows = []
    for unit, comparison in comparisons.items():
        end = verdicts.outcome(said[unit])
        winner = {"won": "model", "lost": comparison.label_1}.get(end, end)
        rows.append({"prompt_id": comparison.prompt_id, f"winner_model_vs_{comparison.label_1}": winner})
    return rows


def _votes(calls: Iterable[Call], log: VerdictLog) -> tuple[Array, Array, Array, int]:
    """(n, 2, 3) votes, (n,) length difference in characters, (n,) identical, number of prompts left out.

    A prompt with no verdict in one of the orders is left out: half of it would carry the judge's bias of position.
    """
    votes: dict[int, Array] = {}
    comparisons: dict[int, Comparison] = {}
    for call in calls:
        unit = id(call.comparison)
        comparisons[unit] = call.comparison
        cast = votes.setdefault(unit, np.zeros((2, 3), dtype=np.int64))
        if record := log.verdict(call):
            cast[ORDERS.index(call.order), verdicts.vote(record["verdict"], call.order)] += 1
    whole = [unit for unit, cast in votes.items() if cast.sum(1).all()]
    scored = [comparisons[unit] for unit in whole]
    return (
        np.array([votes[unit] for unit in whole], dtype=np.int64).reshape(-1, 2, 3),
        np.array([len(one.answer_2) - len(one.answer_1) for one in scored], dtype=np.float64),
        np.array([one.identical for one in scored], dtype=bool),
        len(votes) - len(whole),
    )


def _accounting(calls: Sequence[Call], log: VerdictLog) -> dict[str, int]:
    """How every verdict that was wanted ended; the parts add up to `verdicts`."""
    ends = collections.Counter("identical" if call.free else log.status(call) for call in calls)
    kinds = ("ok", "identical", "refusal", "malformed", "incomplete", "error", "not_asked")
    return {"verdicts": len(calls)} | {kind: ends[kind] for kind in kinds}


def _tokens_of_verdicts(plan: Plan, log: VerdictLog) -> dict[str, int]:
    records = [record for calls in plan.values() for call in calls if (record := log.verdict(call))]
    return {name: sum(record[name] for record in records) for name in ("input_tokens", "output_tokens")}
