"""What a judge's verdicts say, in words: every sentence belongs to a cause, and every cause has one sentence.

A missing number is never a cause by itself: the sentence says why it is missing.
"""

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tandem.intervals import LEVEL, Estimate, estimate

CHANCE = 0.5
SIGNIFICANCE = 1 - LEVEL
ONE_PLACE = 0.25  # a preference for a position is told if the first answer's share of decisions is this far from ½
MANY = 0.05  # a side's answers that are none (empty, cut off) are told if they are more than this share
REASONS_TOLD = 5  # at most so many reasons for lost verdicts in a sentence


class Cause(enum.StrEnum):
    """What a sentence says, whatever its numbers."""

    # why the judge is not believed
    NOT_TRIED = "not_tried"
    TRIED_WITHOUT_VERDICT = "tried_without_verdict"
    LABELLED_IDENTICAL = "labelled_identical"
    NOT_BETTER_THAN_CHANCE = "not_better_than_chance"
    FLIPS_ON_LABELLED = "flips_on_labelled"
    FLIPS_ON_PROMPTS = "flips_on_prompts"
    NAMES_ONE_PLACE = "names_one_place"
    # why its verdicts show no winner
    NO_PROMPT_JUDGED = "no_prompt_judged"
    ALL_IDENTICAL = "all_identical"
    NONE_DECISIVE = "none_decisive"
    MAY_BE_CHANCE = "may_be_chance"
    MISSING_MAY_TURN_IT = "missing_may_turn_it"
    LENGTH_MAY_EXPLAIN = "length_may_explain"
    LENGTH_NOT_MODELLED = "length_not_modelled"
    PEOPLE_DO_NOT_SAY_SO = "people_do_not_say_so"
    # that they do show one
    WON = "won"
    # what readers must know with any conclusion
    NON_ANSWERS = "non_answers"
    WHOLE_ANSWERS = "whole_answers"
    WHOLE_NONE_DECISIVE = "whole_none_decisive"
    NO_WHOLE_ANSWERS = "no_whole_answers"
    LOST_VERDICTS = "lost_verdicts"
    PEOPLE = "people"
    TOO_FEW_LABELS = "too_few_labels"
    LABELS_NOT_DRAWN = "labels_not_drawn"


_INTERVAL = "95% interval {low:.1%} to {high:.1%}"
_FLIPS = "the judge changes sides with the order of the answers on {share:.1%} of the"
_ALLOWED = "more than the {allowed:.1%} allowed"
SENTENCES = {
    Cause.NOT_TRIED: "the judge was not tried on pairs labelled by people, so nothing says that it can judge",
    Cause.TRIED_WITHOUT_VERDICT: "the judge was tried on {missing} pairs labelled by people and gave on none of them "
    "a verdict in both orders, so nothing says that it can judge",
    Cause.LABELLED_IDENTICAL: "both answers are the same in all {identical} labelled pairs with a verdict, so nothing "
    "says that the judge can judge",
    Cause.NOT_BETTER_THAN_CHANCE: "on {n} pairs labelled by people the judge is right in {share:.1%} "
    f"({_INTERVAL}), which is not better than chance",
    Cause.FLIPS_ON_LABELLED: f"{_FLIPS} labelled pairs, {_ALLOWED}",
    Cause.FLIPS_ON_PROMPTS: f"{_FLIPS} prompts, {_ALLOWED}",
    Cause.NAMES_ONE_PLACE: "it names the answer shown {place} in {share:.1%} of its decisions",
    Cause.NO_PROMPT_JUDGED: "on none of {n} prompts did the judge give a verdict in both orders",
    Cause.ALL_IDENTICAL: "no prompt is decisive: both models gave the same answer on all of {n} prompts",
    Cause.NONE_DECISIVE: "no prompt is decisive: on none of {n} do both orders name the same answer",
    Cause.MAY_BE_CHANCE: "{label} wins {wins} and loses {losses} of {n} decisive prompts "
    f"({_INTERVAL}, sign test p = {{p:.2g}}), which may be chance",
    Cause.MISSING_MAY_TURN_IT: "{leader} would not lead if it had lost the {missing} prompts without a verdict",
    Cause.LENGTH_MAY_EXPLAIN: "with length controlled {leader} wins {share:.1%} "
    f"({_INTERVAL}): the lead may be one of length alone",
    Cause.LENGTH_NOT_MODELLED: "{leader} leads, but not certainly where its answer is not the longer one "
    "({n} decisive prompts; length could not be modelled: {why})",
    Cause.PEOPLE_DO_NOT_SAY_SO: "corrected by the labels of people on {n} of the pairs {leader} scores {share:.1%} "
    f"({_INTERVAL}), which is no lead",
    Cause.WON: "{winner} beats {loser} on {share:.1%} of the {n} decisive prompts "
    f"({_INTERVAL}), out of {{scored}} prompts judged in both orders",
    Cause.NON_ANSWERS: "{label} gave no whole answer on {count} of {n} prompts ({reasons})",
    Cause.WHOLE_ANSWERS: "On the {n} prompts that both answered whole, {label} wins {wins} and loses {losses} "
    f"({_INTERVAL})",
    Cause.WHOLE_NONE_DECISIVE: "On the {n} prompts that both answered whole, none of them is decisive",
    Cause.NO_WHOLE_ANSWERS: "No prompt with a verdict was answered whole by both",
    Cause.LOST_VERDICTS: "{count} of {n} verdicts were lost: {reasons}",
    Cause.PEOPLE: "Corrected by the labels of people on {n} of the pairs {label} scores {share:.1%} "
    f"({_INTERVAL}), a tie as half a win",
    Cause.TOO_FEW_LABELS: "The score is not corrected by the labels of people: {why}",
    Cause.LABELS_NOT_DRAWN: "The labelled pairs are not the first of label.html: the correction holds only if they "
    "were drawn at random",
}
# What report.html says of a judge that is not believed, by the reason
WEAKNESS = {
    Cause.NOT_TRIED: "Nothing says that this judge can decide anything.",
    Cause.TRIED_WITHOUT_VERDICT: "Nothing says that this judge can decide anything: tried, it gave no verdict.",
    Cause.LABELLED_IDENTICAL: "Nothing says that this judge can decide anything.",
    Cause.NOT_BETTER_THAN_CHANCE: "This judge is too weak to decide anything.",
    Cause.FLIPS_ON_LABELLED: "This judge goes by the order of the answers too often to decide anything.",
    Cause.FLIPS_ON_PROMPTS: "This judge goes by the order of the answers too often to decide anything.",
}
REASONS = {
    "empty": "empty",
    "cut_off": "cut off by the limit of tokens",
    "unclosed_think": "nothing but reasoning",
    "filtered": "refused by the server",
    "failed": "failed on by the server",
    "not_text": "not text",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """A cause with the numbers of its sentence."""

    cause: Cause
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> str:
        """The sentence, without its full stop."""
        return SENTENCES[self.cause].format(**self.facts)

    @property
    def record(self) -> dict[str, Any]:
        """The finding as judge_summary.json holds it."""
        return {"cause": str(self.cause), **self.facts}


def untried(labelled: Mapping[str, Any]) -> Finding | None:
    """Why the judge has no accuracy on labelled pairs; None if it has one."""
    if labelled["accuracy"]["value"] is not None:
        return None
    if labelled.get("n_identical"):
        return Finding(Cause.LABELLED_IDENTICAL, {"identical": labelled["n_identical"]})
    if labelled["n_missing"]:
        return Finding(Cause.TRIED_WITHOUT_VERDICT, {"missing": labelled["n_missing"]})
    return Finding(Cause.NOT_TRIED)


def distrust(labelled: Mapping[str, Any], result: Mapping[str, Any], max_flip_rate: float) -> list[Finding]:
    """Why no winner may be named by this judge's verdicts; empty if one may."""
    found = []
    accuracy = labelled["accuracy"]
    if (why := untried(labelled)) is not None:
        found.append(why)
    elif accuracy["low"] <= CHANCE:
        found.append(Finding(Cause.NOT_BETTER_THAN_CHANCE, _share(accuracy) | {"n": accuracy["n"]}))
    for cause, part in ((Cause.FLIPS_ON_LABELLED, labelled), (Cause.FLIPS_ON_PROMPTS, result)):
        rate = part["order_flip_rate"]["value"]
        if rate is not None and rate > max_flip_rate:
            found.append(Finding(cause, {"share": rate, "allowed": max_flip_rate}))
    first = result["first_position_rate"]["value"]
    if found and first is not None and abs(first - CHANCE) > ONE_PLACE:
        place = "first" if first > CHANCE else "second"
        found.append(Finding(Cause.NAMES_ONE_PLACE, {"place": place, "share": max(first, 1 - first)}))
    return found


def doubts(result: Mapping[str, Any], label_1: str, label_2: str) -> list[Finding]:
    """Why the verdicts, if the judge is believed, show no winner; empty if they show one.

    A winner leads on the prompts where both orders agree (by Wilson's interval and the sign test), would still lead if
    it had lost every prompt without a verdict, and leads for another reason than length.
    """
    counts = result["orders_agree"]
    rate = counts["win_rate"]
    if rate["value"] is None:
        return [_undecided(result)]
    leads = rate["value"] > CHANCE
    leader = label_2 if leads else label_1
    if rate["low"] <= CHANCE <= rate["high"] or counts["sign_test_p"] >= SIGNIFICANCE:
        facts = {"label": label_2, "wins": counts["wins"], "losses": counts["losses"], "n": rate["n"]}
        return [Finding(Cause.MAY_BE_CHANCE, facts | _share(rate) | {"p": counts["sign_test_p"]})]
    found = []
    worst = result["bounds"]["missing_as_losses" if leads else "missing_as_wins"]["win_rate"]["value"]
    if (worst > CHANCE) != leads or worst == CHANCE:
        found.append(Finding(Cause.MISSING_MAY_TURN_IT, {"leader": leader, "missing": result["n_missing"]}))
    return [*found, *_doubts_of_length(result, leader, leads), *_doubts_of_people(result, leader, leads)]


def _undecided(result: Mapping[str, Any]) -> Finding:
    if not result["n_scored"]:
        return Finding(Cause.NO_PROMPT_JUDGED, {"n": result["n_prompts"]})
    same = result["n_identical"] == result["n_scored"]
    return Finding(Cause.ALL_IDENTICAL if same else Cause.NONE_DECISIVE, {"n": result["n_scored"]})


def _doubts_of_length(result: Mapping[str, Any], leader: str, leads: bool) -> Iterator[Finding]:
    default = result["decided_by_non_answers"]["win_rate"]
    if default["value"] is not None and (default["low"] > CHANCE if leads else default["high"] < CHANCE):
        return  # it leads by prompts that the other side gave no whole answer to: there length explains nothing
    controlled = result["length_controlled"]
    if controlled["value"] is None:
        # Length cannot be modelled: look at the prompts where the leader's answer is not the longer one
        fair = result["when_not_longer"]["side_2" if leads else "side_1"]
        if fair["value"] is None or fair["low"] <= CHANCE:
            facts = {"leader": leader, "n": fair["n"], "why": controlled["why"]}
            yield Finding(Cause.LENGTH_NOT_MODELLED, facts)
    elif not (controlled["low"] > CHANCE if leads else controlled["high"] < CHANCE):
        share = controlled if leads else _other_side(controlled)
        yield Finding(Cause.LENGTH_MAY_EXPLAIN, {"leader": leader} | _share(share))


def _doubts_of_people(result: Mapping[str, Any], leader: str, leads: bool) -> Iterator[Finding]:
    people = result.get("corrected", {}).get("by_people")
    if people is None or people["value"] is None:
        return
    share = people if leads else _other_side(people)
    if share["low"] <= CHANCE:
        yield Finding(Cause.PEOPLE_DO_NOT_SAY_SO, {"leader": leader, "n": people["n"]} | _share(share))


def non_answers(result: Mapping[str, Any], label_1: str, label_2: str) -> list[Finding]:
    """The sides that gave no whole answer on more than 5% of the prompts, and what the other prompts say."""
    found = []
    for side, label in (("side_2", label_2), ("side_1", label_1)):
        about = result.get("non_answers", {}).get(side)
        count = sum(about["reasons"].values()) if about else 0
        if about and count > MANY * about["n"]:
            reasons = ", ".join(f"{number} {REASONS.get(name, name)}" for name, number in about["reasons"].items())
            facts = {"label": label, "count": count, "n": about["n"], "reasons": reasons}
            found.append(Finding(Cause.NON_ANSWERS, facts))
    if found:
        found.append(_whole(result["whole_answers"], label_2))
    return found


def _whole(whole: Mapping[str, Any], label_2: str) -> Finding:
    rate = whole["win_rate"]
    if not whole["n_prompts"]:
        return Finding(Cause.NO_WHOLE_ANSWERS)
    if rate["value"] is None:
        return Finding(Cause.WHOLE_NONE_DECISIVE, {"n": whole["n_prompts"]})
    facts = {"n": whole["n_prompts"], "label": label_2, "wins": whole["wins"], "losses": whole["losses"]}
    return Finding(Cause.WHOLE_ANSWERS, facts | _share(rate))


def lost_verdicts(lost: Sequence[Mapping[str, Any]], asked: int) -> list[Finding]:
    """That verdicts were lost, and why, if any were.

    Args:
        lost: rows of `status`, `reason` and `count`
        asked: number of verdicts that were asked for
    """
    if not lost:
        return []
    counts: dict[tuple[str, str], int] = {}
    for row in lost:
        key = row["status"], row["reason"]
        counts[key] = counts.get(key, 0) + row["count"]
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    told = [f"{count} {status} ({reason})" for (status, reason), count in ranked[:REASONS_TOLD]]
    if rest := sum(count for _, count in ranked[REASONS_TOLD:]):
        told.append(f"{rest} for other reasons")
    return [Finding(Cause.LOST_VERDICTS, {"count": sum(counts.values()), "n": asked, "reasons": "; ".join(told)})]


def conclude(
    result: Mapping[str, Any],
    labelled: Mapping[str, Any],
    labels: tuple[str, str],
    max_flip_rate: float,
    besides: Sequence[Finding] = (),
) -> dict[str, Any]:
    """What judge_summary.json says first.

    `winner` (a label or None), `conclusion`, `why` (the reasons against a winner), `warnings` (sentences that are part
    of the conclusion too) and `causes` (of each sentence, in order).

    Args:
        labels: of side 1 and of side 2
        besides: further findings that are told with any conclusion
    """
    winner = None
    against = distrust(labelled, result, max_flip_rate)
    between = f"{labels[1]} and {labels[0]}"
    if against:
        sentence = f"No winner is named between {between}: {against[0].words}."
    elif against := doubts(result, *labels):
        sentence = f"No winner between {between}: {against[0].words}."
    else:
        won = _won(result, *labels)
        winner, sentence = won.facts["winner"], f"{won.words}."
    warnings = [*non_answers(result, *labels), *besides]
    told = [f"{finding.words}." for finding in warnings]
    return {
        "winner": winner,
        "conclusion": " ".join([sentence, *told]),
        "why": [finding.words for finding in against],
        "warnings": told,
        "causes": [finding.record for finding in [*(against or [won]), *warnings]],
    }


def _won(result: Mapping[str, Any], label_1: str, label_2: str) -> Finding:
    rate = result["orders_agree"]["win_rate"]
    sides = {"winner": label_2, "loser": label_1}
    if rate["value"] < CHANCE:
        sides, rate = {"winner": label_1, "loser": label_2}, _other_side(rate)
    return Finding(Cause.WON, sides | _share(rate) | {"n": rate["n"], "scored": result["n_scored"]})


def _share(share: Mapping[str, Any]) -> dict[str, Any]:
    return {"share": share["value"], "low": share["low"], "high": share["high"]}


def _other_side(share: Mapping[str, Any]) -> Estimate:
    return estimate(1 - share["value"], 1 - share["high"], 1 - share["low"], share["n"])
