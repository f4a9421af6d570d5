"""Answers that are none: counted, told with the conclusion, and never taken for a matter of length."""

import numpy as np

from tandem.judge import conclusions, statistics
from tandem.judge.comparisons import load_comparisons
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Judge
from tandem.judge.run import judge
from tandem.judge.summary import non_answers
from tandem.runs import append_jsonl
from tests.judge.fault_server import FaultServer
from tests.judge.judge_once import labelled, options

RATE = {"value": 0.75, "low": 0.3, "high": 1.0}
THINK = f"<think>{'hm ' * 250}</think>\n\n"


def write(folder, label, texts, reason="stop"):
    for index, text in enumerate(texts):
        message = {"role": "user", "content": f"Question {index}?"}
        row = {"prompt_id": f"p{index}", "messages": [message], "text": text, "finish_reason": reason}
        append_jsonl(folder / f"generations_{label}.jsonl", row)


def judged(tmp_path, base, dpo):
    write(tmp_path, "base", base)
    write(tmp_path, "dpo", dpo)
    given = JudgeOptions(judge_model="m", base_url="http://h/v1", run_dir=str(tmp_path))
    pairs = load_comparisons(given, [])
    with FaultServer().serving() as url:
        return judge(options(url, str(tmp_path / "judge"), self_pairs=0), pairs, labelled(40))


def test_reasoning_of_one_length_does_not_hide_a_winner(tmp_path):
    """Better on every prompt, in answers of differing lengths, behind a block of reasoning of 750 characters."""
    base = [f"answer 1 {'x' * (index * 7 % 20)}" for index in range(30)]
    dpo = [f"{THINK}answer {2 if index % 10 else 0} {'y' * (index * 3 % 20)}" for index in range(30)]
    summary = judged(tmp_path, base, dpo)
    assert summary["winner"] == "dpo", summary["conclusion"]
    assert abs(summary["result"]["mean_length_difference"]) < 20
    assert summary["warnings"] == []


def test_empty_answers_are_no_matter_of_length(tmp_path):
    """The field's case: DPO empty on 23 of 30 prompts and base on 8, those 8 alike."""
    dpo = ["" if index < 23 else "answer 5" for index in range(30)]
    base = ["" if index < 8 else "answer 5" for index in range(30)]
    summary = judged(tmp_path, base, dpo)
    result = summary["result"]
    assert result["orders_agree"]["losses"] == 15 == result["decided_by_non_answers"]["losses"]
    assert result["non_answers"]["side_2"] == {"n": 30, "reasons": {"empty": 23}}
    assert summary["winner"] == "base"
    assert "length" not in summary["conclusion"]
    assert "dpo gave no whole answer on 23 of 30 prompts (23 empty)." in summary["conclusion"]
    assert "On the 7 prompts that both answered whole, none of them is decisive." in summary["conclusion"]
    assert result["length_controlled"]["n"] == 7


def test_the_length_model_leaves_them_out():
    rng = np.random.default_rng(0)
    votes = np.eye(3, dtype=np.int64)[rng.choice([0, 2], (60, 2))]
    length = rng.normal(0, 50, 60)
    spoiled = np.zeros((60, 2), dtype=bool)
    spoiled[:20, 1] = True
    got = statistics.summarise(votes, length, np.zeros(60, dtype=bool), 0, 0, spoiled)
    alone = statistics.summarise(votes[20:], length[20:], np.zeros(40, dtype=bool), 0, 0)
    assert got["length_controlled"] == alone["length_controlled"]
    assert got["when_not_longer"] == alone["when_not_longer"]
    assert got["orders_agree"]["wins"] == got["whole_answers"]["wins"] + int(
        (statistics.strict_outcomes(votes[:20]) == 1).sum()
    )


def test_up_to_five_in_a_hundred_are_not_in_the_headline():
    result = {
        "whole_answers": {"n_prompts": 94, "wins": 3, "losses": 1, "win_rate": {"value": 0.75, "low": 0.3, "high": 1}}
    }
    for count, told in ((5, 0), (6, 2)):
        sides = {"side_1": {"n": 100, "reasons": {}}, "side_2": {"n": 100, "reasons": {"cut_off": count}}}
        assert len(conclusions.non_answers(result | {"non_answers": sides}, "base", "dpo")) == told


def test_an_unclosed_block_is_an_empty_answer(tmp_path):
    write(tmp_path, "base", ["answer 1"])
    write(tmp_path, "dpo", ["<think>answer 9"], "length")
    given = JudgeOptions(judge_model="m", base_url="http://h/v1", run_dir=str(tmp_path))
    [pair] = load_comparisons(given, [])
    assert (pair.answer_2, pair.non_answer_1, pair.non_answer_2) == ("", None, "unclosed_think")
    calls = Judge("u", "m", True, None, 1).calls("main", [pair], 2)
    assert non_answers(calls)["side_2"] == {"n": 1, "reasons": {"unclosed_think": 1}}
