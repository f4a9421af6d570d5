"""The page's verdict: which model answers better, how far the judge can be trusted, and what judging cost."""

import re
from collections.abc import Iterable

from tandem.judge.conclusions import WEAKNESS, distrust, untried
from tandem.report.collect import Json, Run, as_written
from tandem.report.numbers import model_name, number, percent, show_interval, show_p

CALLS = {"labelled": "Labelled pairs", "self": "Answers against themselves", "main": "Models compared"}


def headline(run: Run) -> Json:
    """The verdict: `tag`, `tone`, `sentence`, `calibration`, `weakness`, `besides` and `measured`.

    `weakness` says what is wrong with a judge that is not believed; `besides` are reasons against a winner that are not
    in `sentence`.
    """
    measured = _measured(run)
    if run.judge is None:
        return {
            "tag": "Not judged",
            "tone": "open",
            "sentence": "No judge has compared these models, so nothing here says which one answers better.",
            "calibration": None,
            "weakness": None,
            "besides": [],
            "measured": measured,
        }
    with as_written(run.folder / "judge_summary.json"):
        calibration, winner = run.judge["calibration"], run.judge["winner"]
        against = distrust(calibration["labelled"], run.judge["result"], calibration["max_flip_rate"])
        return {
            "tag": f"{model_name(winner)} wins" if winner else "No winner named",
            "tone": "decided" if winner else "open",
            "sentence": _with_names(run.judge["conclusion"], run.judge["labels"].values()),
            "calibration": _calibration(run.judge),
            "weakness": WEAKNESS[against[0].cause] if against else None,
            "besides": [_with_names(reason, run.judge["labels"].values()) for reason in run.judge["why"][1:]],
            "measured": measured,
        }


def _with_names(sentence: str, labels: Iterable[str]) -> str:
    for label in labels:
        sentence = re.sub(rf"\b{re.escape(label)}\b(?!-)", model_name(label), sentence)
    return sentence


def _calibration(judge: Json) -> str:
    labelled, result = judge["calibration"]["labelled"], judge["result"]
    accuracy, flips, first = labelled["accuracy"], result["order_flip_rate"], result["first_position_rate"]
    if (why := untried(labelled)) is not None:
        parts = [why.words[0].upper() + why.words[1:]]
    else:
        parts = [
            f"On {accuracy['n']} pairs labelled by people the judge agrees with them in {percent(accuracy['value'])} "
            f"(95% interval {show_interval(accuracy, True)}; chance is 50%)"
        ]
    if flips["value"] is not None:
        parts.append(f"it changes sides with the order of the answers in {percent(flips['value'])}")
    if first["value"] is not None:
        parts.append(f"it names the answer shown first in {percent(first['value'])} of its decisions")
    return "; ".join(parts) + "."


def _measured(run: Run) -> str | None:
    """The held-out preference accuracies as a sentence."""
    if run.results is None:
        return None
    with as_written(run.folder / "results.json"):
        accuracies = {
            label: metrics["preference_accuracy"]
            for label, metrics in run.results["models"].items()
            if "preference_accuracy" in metrics
        }
        if not accuracies:
            return None
        parts = [
            f"the {model_name(label)} model prefers the chosen answer in {percent(estimate['value'])}"
            + (f" ({interval})" if (interval := show_interval(estimate, True)) else "")
            for label, estimate in sorted(accuracies.items(), key=lambda item: item[0] != "dpo")
        ]
        return f"On {run.results['n_pairs']} held-out pairs, " + "; ".join(parts) + "."


def judgement(run: Run) -> Json | None:
    """The judge's numbers and those that say how far it can be trusted, as rows of title, meaning and estimate; how its
    calls ended; other judgements."""
    if run.judge is None:
        return None
    with as_written(run.folder / "judge_summary.json"):
        result, calibration = run.judge["result"], run.judge["calibration"]
        agreed, mean = result["orders_agree"], result["mean_of_orders"]
        labelled, by_length = calibration["labelled"], calibration["labelled"]["accuracy_by_length"]
        counts = f"of {agreed['wins']} wins and {agreed['losses']} losses; sign test {show_p(agreed['sign_test_p'])}"
        said = [
            ("Win rate, both orders agreeing", counts, agreed["win_rate"]),
            (
                "Win rate, mean of the orders",
                f"{mean['wins']} wins, {mean['ties']} ties, {mean['losses']} losses",
                mean["win_rate"],
            ),
            ("Mean score", "win 1, tie ½, loss 0", result["mean_score"]),
            *_corrected(result),
            ("Win rate, length controlled", "were both answers equally long", result["length_controlled"]),
            (
                "If every missing prompt were lost",
                f"{result['n_missing']} without a verdict in both orders",
                result["bounds"]["missing_as_losses"]["win_rate"],
            ),
            ("Names the answer shown first", "50% is no preference", result["first_position_rate"]),
            ("Changes sides with the order", "of prompts with a winner in both orders", result["order_flip_rate"]),
        ]
        trust = [
            ("Agrees with people", "on held-out pairs they labelled; chance is 50%", labelled["accuracy"]),
            ("… where rejected is longer", "", by_length["rejected_longer"]),
            ("… where both are alike in length", "", by_length["similar"]),
            ("… where chosen is longer", "", by_length["chosen_longer"]),
            ("Changes sides with the order", "on the same pairs", labelled["order_flip_rate"]),
            ("Calls an answer equal to itself", "should be 100%", calibration["self_vs_self"]["tie_rate"]),
        ]
        why = untried(labelled)
        return {
            "model": run.judge["judge"]["model"],
            "schema_enforced": run.judge["judge"]["schema_enforced"],
            "policy": model_name(run.judge["labels"]["side_2"]),
            "other": model_name(run.judge["labels"]["side_1"]),
            "n_prompts": result["n_prompts"],
            "said": said if result["n_scored"] else [],
            "said_nothing": f"No prompt of {result['n_prompts']} has a verdict in both orders.",
            "trust": trust if why is None else [row for row in trust if row[2]["n"]],
            "untried": None if why is None else f"No numbers: {why.words}.",
            "kappa": labelled["cohen_kappa"],
            "endings": list(run.judge["accounting"]["main"]),
            "lost": lost_prompts(run),
            "others": others_judged(run),
            "accounting": [(CALLS[kind], list(ends.values())) for kind, ends in run.judge["accounting"].items()],
        }


def _corrected(result: Json) -> list[tuple[str, str, Json]]:
    """Rows of the score corrected for the judge's errors; a summary of an older version has none."""
    found = result.get("corrected")
    if found is None:
        return []
    if found["by_people"] is not None:
        about = "by people's labels on some of these pairs; prediction-powered inference, ties as halves"
        alone = "the labels without the judge"
        return [("Score, corrected", about, found["by_people"]), ("Score by people", alone, found["people_alone"])]
    return [("Score, corrected", f"if {found['by_error_rates']['assumes']}; ties as halves", found["by_error_rates"])]


def lost_prompts(run: Run) -> list[Json]:
    """Why prompts lack a verdict in an order: `status`, `reason`, and the prompts' `numbers` in the page's list."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(run.answers, start=1):
        for verdict in row["verdicts"]:
            if verdict["status"] != "ok":
                numbers = found.setdefault((verdict["status"], verdict["text"] or ""), [])
                if place not in numbers:
                    numbers.append(place)
    rows = sorted(found.items(), key=lambda item: -len(item[1]))
    return [{"status": status, "reason": reason, "numbers": numbers} for (status, reason), numbers in rows]


def others_judged(run: Run) -> list[Json]:
    """Other judgements in the run's folder: `sides`, `model`, `sentence` and the `win_rate` of the judged model."""
    rows = []
    for name, summary in run.others_judged.items():
        with as_written(run.folder / f"{name}_summary.json"):
            labels = summary["labels"]
            rows.append(
                {
                    "sides": f"{model_name(labels['side_2'])} against {model_name(labels['side_1'])}",
                    "model": summary["judge"]["model"],
                    "sentence": _with_names(summary["conclusion"], labels.values()),
                    "win_rate": summary["result"]["orders_agree"]["win_rate"],
                }
            )
    return rows


def spent(run: Run) -> str | None:
    """Replies, tokens and cost of the judge as a sentence."""
    if run.usage is None:
        return None
    with as_written(run.folder / "judge" / "usage.json"):
        cost = run.usage["cost"]
        tokens = f"{number(run.usage['input_tokens'])} tokens in and {number(run.usage['output_tokens'])} out"
        price = "No prices were given, so the cost is not known."
        if cost is not None:
            price = f"Cost: {number(float(cost))}, in the currency of the prices given."
        return f"{number(run.usage['replies'])} replies, {tokens}. {price}"
