"""Ranks several models by the verdicts of one or more judges on every pair of models."""

import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tandem import ranks
from tandem.errors import UserError
from tandem.intervals import Array, Estimate, bootstrap, estimate, mean
from tandem.judge import bradley_terry, calibration, conclusions, statistics, summary
from tandem.judge.comparisons import paired, read_answers
from tandem.judge.options import JudgeOptions
from tandem.judge.rank_options import RankOptions
from tandem.judge.requests import Comparison
from tandem.judge.run import dry_run, gather
from tandem.runs import locked, write_json

Key = tuple[str, str, str]  # prompt, label of side 1, label of side 2


class Said(NamedTuple):
    """A judge's decision on one comparison, from its verdicts in both orders."""

    comparison: Comparison
    score: float  # of side 2, the mean of both orders: win 1, tie ½, loss 0
    outcome: int  # of side 2: 1 won, 0 tie, −1 lost


def all_pairs(options: RankOptions) -> list[Comparison]:
    """Every pair of models on every prompt, or on the first of the first file.

    Raises:
        UserError: a file is missing, a row of it cannot be read, or two files answer different prompts.
    """
    sides = [read_answers(file, label) for label, file in options.files]
    # Files of one run differ in their order: a backend writes answers down as they get ready
    keys = list(sides[0].rows)[: options.max_prompts]
    return [pair for one, other in itertools.combinations(sides, 2) for pair in paired(one, other, keys)]


def rank(options: RankOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]) -> dict[str, Any]:
    """Have each judge compare every pair in both orders, and rank the models; returns what ranking.json holds.

    A judge's replies and verdicts are in a folder of its own below `judges/`, as `judge.run` writes them: the same call
    again, or one with further models or judges, asks only what has no verdict yet. With `dry_run` nothing is asked or
    written, and an estimate for each judge is returned.

    Raises:
        UserError: there is nothing to compare, or for the reasons of `judge.run.judge`.
    """
    ranks.refuse_several("rank")
    if not comparisons:
        raise UserError("there is nothing to rank: the files hold no answers")
    labels = [label for label, _ in options.files]
    asked = [options.of_judge(index) for index in range(len(options.judge_model))]
    if options.dry_run:
        return {"dry_run": True, "judges": [_estimate(each, comparisons, labelled) for each in asked]}
    judges, said = [], []
    for each in asked:
        about, found = _one_judge(each, labels, comparisons, labelled)
        judges.append(about)
        said.append(found)
    believed = [found for about, found in zip(judges, said, strict=True) if not about["distrust"]]
    result = {
        "labels": labels,
        "n_prompts": len({pair.prompt_id for pair in comparisons}),
        "judges": judges,
        "agreement": agreement(said),
        "together": strengths_of(labels, averaged(believed)) if believed else None,
    }
    result["conclusion"] = conclusion(result)
    write_json(Path(options.output_dir) / "ranking.json", result)
    return result


def _estimate(options: JudgeOptions, comparisons: Sequence[Comparison], labelled: Sequence[Comparison]) -> Any:
    return {"model": options.judge_model, **dry_run(options, comparisons, labelled)}


def _one_judge(
    options: JudgeOptions, labels: Sequence[str], comparisons: Sequence[Comparison], labelled: Sequence[Comparison]
) -> tuple[dict[str, Any], dict[Key, Said]]:
    with locked(options.folder):
        judge, plan, log, _ = gather(options, comparisons, labelled)
        write_json(options.folder / "usage.json", log.usage())
    cast = summary.votes_cast(plan["main"], log)
    seen = np.array([votes for pair, votes in cast if votes.sum(1).all() and not pair.identical]).reshape(-1, 2, 3)
    habits = {
        "order_flip_rate": statistics.flip_rate(seen),
        "first_position_rate": statistics.first_position_rate(seen),
    }
    tried = calibration.agreement(*summary.votes_of(plan["labelled"], log)[:4])
    said = {}
    for pair, votes in cast:
        if votes.sum(1).all():
            one = votes[None]
            key = (pair.prompt_id, pair.label_1, pair.label_2)
            outcome = int(statistics.mean_outcomes(one)[0])
            said[key] = Said(pair, float(statistics.prompt_scores(one)[0]), outcome)
    lost = summary.lost_verdicts(plan, log)
    about = {
        "model": judge.model,
        "base_url": judge.base_url,
        "schema_enforced": judge.schema_enforced,
        "labelled": tried,
        **habits,
        "n_missing": len(cast) - len(said),
        "lost": lost,
        "usage": log.usage(),
        "distrust": [each.words for each in conclusions.distrust(tried, habits, options.max_flip_rate)],
        "warnings": [
            f"{each.words}." for each in conclusions.lost_verdicts(lost, sum(len(calls) for calls in plan.values()))
        ],
        **strengths_of(labels, said),
    }
    return about, said


def strengths_of(labels: Sequence[str], said: Mapping[Key, Said]) -> dict[str, Any]:
    """Strengths of the models, raw and with length controlled, and the score of each model against each other one.

    `models` has, by label, `strength` (log-odds against the average model), `length_controlled`, and `mean_score`, the
    average score against the others. `against` has rows of `label`, `other` and the mean `score`. Where a model won or
    lost everything, strengths are kept finite by a prior (`bounded_by` says why), without clustering by prompt.
    """
    first = np.array([labels.index(key[2]) for key in said], dtype=np.int64)
    second = np.array([labels.index(key[1]) for key in said], dtype=np.int64)
    scores = np.array([each.score for each in said.values()])
    units = np.unique([key[0] for key in said], return_inverse=True)[1] if said else np.zeros(0, dtype=np.int64)
    raw = bradley_terry.fit(first, second, scores, units, labels)
    bounded_by = raw[labels[0]].get("why")
    if bounded_by == bradley_terry.NO_BOUND:
        found = bradley_terry.strengths(first, second, scores, len(labels))
        raw = dict(zip(labels, found, strict=True))
    else:
        bounded_by = None
    controlled = _length_controlled(labels, said, (first, second, scores, units))
    models = {
        label: {
            "strength": raw[label],
            "length_controlled": controlled[label],
            "mean_score": _mean_score(scores, first == index, second == index),
        }
        for index, label in enumerate(labels)
    }
    return {"models": models, "bounded_by": bounded_by, "against": _against(labels, said)}


def _length_controlled(
    labels: Sequence[str], said: Mapping[Key, Said], data: tuple[Array, Array, Array, Array]
) -> dict[str, Estimate]:
    """The strengths that the models would have if all answers were equally long.

    Comparisons with an answer that is none (empty, cut off) are left out.
    """
    pairs = [each.comparison for each in said.values()]
    whole = np.array([pair.non_answer_1 is None and pair.non_answer_2 is None for pair in pairs], dtype=bool)
    length = np.array([len(pair.answer_2) - len(pair.answer_1) for pair in pairs], dtype=float)[whole]
    spread = length.std() if len(length) else 0.0
    if spread == 0:
        why = "the difference in length is the same everywhere: there is nothing to control for"
        return {label: estimate(None, None, None, len(length), why) for label in labels}
    first, second, scores, units = (part[whole] for part in data)
    return bradley_terry.fit(first, second, scores, units, labels, covariate=np.tanh(length / spread))


def _mean_score(scores: Array, as_first: Array, as_second: Array) -> Estimate:
    own = np.concatenate([scores[as_first], 1 - scores[as_second]])
    if not len(own):
        return estimate(None, None, None, 0, "none of its comparisons was judged in both orders")
    return estimate(own.mean(), None, None, len(own))


def _against(labels: Sequence[str], said: Mapping[Key, Said]) -> list[dict[str, Any]]:
    rows = []
    for one, other in itertools.combinations(labels, 2):
        scores = np.array([each.score for key, each in said.items() if key[1:] == (one, other)])
        score = (
            bootstrap(mean, [scores], 0)
            if len(scores)
            else estimate(None, None, None, 0, "no prompt was judged in both orders")
        )
        rows.append({"label": other, "other": one, "score": score})
    return rows


def averaged(judges: Sequence[Mapping[Key, Said]]) -> dict[Key, Said]:
    """The mean of the judges' scores on each comparison that all of them decided."""
    shared = [key for key in judges[0] if all(key in each for each in judges)]
    found = {}
    for key in shared:
        score = sum(each[key].score for each in judges) / len(judges)
        found[key] = Said(judges[0][key].comparison, score, int(np.sign(score - 0.5)))
    return found


def agreement(said: Sequence[Mapping[Key, Said]]) -> list[dict[str, Any]]:
    """Cohen's κ of every two judges, over win, tie and loss on the comparisons that both decided."""
    from sklearn.metrics import cohen_kappa_score

    rows = []
    for (one, first), (other, second) in itertools.combinations(enumerate(said), 2):
        shared = [key for key in first if key in second and not first[key].comparison.identical]
        outcomes = [[each[key].outcome for key in shared] for each in (first, second)]
        row: dict[str, Any] = {"one": one, "other": other, "n": len(shared), "kappa": None}
        if not shared:
            row["why"] = "no comparison was judged by both"
        elif len({*outcomes[0], *outcomes[1]}) < 2:
            row["why"] = "both say the same of every comparison: chance cannot be told from agreement"
        else:
            row["kappa"] = float(cohen_kappa_score(*outcomes, labels=[-1, 0, 1]))
        if shared:
            row["same"] = sum(map(operator.eq, *outcomes)) / len(shared)
        rows.append(row)
    return rows


def conclusion(result: Mapping[str, Any]) -> str:
    """The ranking in a sentence: which model surely leads, if one does, or why there is no ranking."""
    together = result["together"]
    if together is None:
        reasons = "; ".join(f"{judge['model']}: {judge['distrust'][0]}" for judge in result["judges"])
        return f"No ranking is named: {reasons}."
    models = together["models"]
    controlled = all(each["length_controlled"]["value"] is not None for each in models.values())
    name = "length_controlled" if controlled else "strength"
    if any(each[name]["value"] is None for each in models.values()):
        return f"No ranking is named: {next(iter(models.values()))[name]['why']}."
    order = sorted(models, key=lambda label: -models[label][name]["value"])
    how = " with length controlled" if controlled else ""
    ahead = [label for label in order if models[label][name].get("ranks", [1, 2])[1] == 1]
    ranked = " > ".join(order)
    left_out = [judge["model"] for judge in result["judges"] if judge["distrust"]]
    told = f"{ranked}{how}; " + (f"{ahead[0]} surely leads." if ahead else "no model surely leads.")
    return told + (f" Left out: {', '.join(left_out)}." if left_out else "")
