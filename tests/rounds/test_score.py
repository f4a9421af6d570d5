import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForSequenceClassification

from tandem.errors import UserError
from tandem.rounds.judged import read_mark
from tandem.rounds.options import PairOptions, ScoreOptions
from tandem.rounds.pairs import make_pairs
from tandem.rounds.score import score, to_markdown
from tandem.runs import read_jsonl
from tests.judge.fault_server import FaultServer
from tests.rounds.chat_server import ChatServer
from tests.rounds.test_reward import save as save_reward

CHECK = """
import pathlib
LOG = pathlib.Path(__file__).with_name("calls.txt")

def length(prompt, answer, row):
    with LOG.open("a") as log:
        log.write(answer + "\\n")
    if answer == "crash":
        raise ValueError("cannot\\nbe")
    if answer == "none":
        return None
    return len(answer) * row.get("weight", 1) + prompt[-1]["content"].count("!")

def word(prompt, answer, row):
    return "good"

def broken(prompt, answer, row):
    return 1 / 0
"""


def answer(prompt: str, text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "text": text} | more


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "check.py").write_text(CHECK)
    return folder / "samples.jsonl"


def scored(folder: Path, rows: list[dict[str, Any]], **given: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    options = ScoreOptions(samples=str(write(folder, rows)), output_dir=str(folder / "out"), **given)
    return score(options), read_jsonl(folder / "out" / "scores.jsonl")


def test_a_function_scores_and_non_answers_get_none(tmp_path: Path):
    rows = [
        answer("q!", "four"),
        answer("q!", ""),
        answer("q!", "<think>hm"),
        answer("q!", "cut", finish_reason="length"),
        answer("q!", "crash"),
        answer("q!", "none"),
    ]
    function = f"{tmp_path}/check.py:length"
    report, records = scored(tmp_path, rows, score_function=[function])
    assert [record["score"] for record in records] == [5.0, None, None, None, None, None]
    assert [record["non_answer"] for record in records[:4]] == [None, "empty", "unclosed_think", "cut_off"]
    assert records[0]["scorer"] == f"function:{function}"
    assert records[4]["unscored"] == {f"function:{function}": "error: ValueError: cannot be"}
    assert report["scored"] == 1
    assert report["non_answers"] == {"empty": 1, "unclosed_think": 1, "cut_off": 1}
    assert "error: ValueError: cannot be 1" in to_markdown(report)


def test_a_text_is_scored_once_and_a_changed_function_anew(tmp_path: Path):
    rows = [answer("q", "four"), answer("q", "four"), answer("r", "four"), answer("q", "fiver")]
    function = f"{tmp_path}/check.py:length"
    _, first = scored(tmp_path, rows, score_function=[function])
    assert (tmp_path / "calls.txt").read_text().split() == ["four", "four", "fiver"]
    cache = tmp_path / "out" / "scores_cache.jsonl"
    lines = cache.read_bytes().splitlines(keepends=True)
    cache.write_bytes(lines[0] + lines[1][:9])  # killed
    _, again = scored(tmp_path, rows, score_function=[function])
    assert again == first
    assert len((tmp_path / "calls.txt").read_text().split()) == 5
    cache.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match="damaged"):
        scored(tmp_path, rows, score_function=[function])


def test_the_row_of_the_data_reaches_the_function(tmp_path: Path):
    from tandem.data.formats import prompt_id

    row = answer("q", "four")
    prompt = {"prompt_id": prompt_id(row["messages"]), "messages": row["messages"], "row": {"weight": 10}}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    _, records = scored(tmp_path, [row], score_function=[f"{tmp_path}/check.py:length"])
    assert records[0]["score"] == 40.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "has no gone"),
        ("LOG", "not a function"),
        ("word", "must give a number or None, not str"),
        ("broken", "failed on all of 10 answers: ZeroDivisionError"),
    ],
)
def test_functions_that_are_none(tmp_path: Path, name: str, said: str):
    with pytest.raises(UserError, match=said) as error:
        scored(tmp_path, [answer("q", f"a{i}") for i in range(30)], score_function=[f"{tmp_path}/check.py:{name}"])
    assert "--score_function" in str(error.value)


def test_how_a_reward_model_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batches of so many answers, and weights of that type: a random model's scores differ by their rounding."""
    rows, name, sizes = (
        [answer("q", text) for text in ("a b c", "d e", "f")],
        str(save_reward(tmp_path / "r", "eos")),
        [],
    )
    forward = LlamaForSequenceClassification.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", watched)
    _, exact = scored(tmp_path, rows, reward_models=[name], reward_batch_size=2, reward_dtype="float32")
    assert sizes == [2, 1]
    _, rounded = scored(tmp_path, rows, reward_models=[name], reward_dtype="bfloat16")
    assert sizes == [2, 1, 3]
    differences = [abs(one["score"] - other["score"]) for one, other in zip(exact, rounded, strict=True)]
    assert 0 < max(differences) < 0.1


def test_reward_models_are_joined(tmp_path: Path):
    names = [str(save_reward(tmp_path / name, "eos")) for name in ("one", "two")]
    rows = [answer("q", "a b c"), answer("q", "d e")]
    for how, join in (("mean", lambda a, b: (a + b) / 2), ("min", min)):
        _, records = scored(tmp_path, rows, reward_models=names, reward_combine=how, reward_batch_size=3)
        for record in records:
            own = [record["scores"][f"reward:{name}"] for name in names]
            assert record["score"] == pytest.approx(join(*own))
            assert record["scorer"] == f"reward:{how}"
    _, records = scored(tmp_path, rows, reward_models=names, rank_by=f"reward:{names[1]}", reward_dtype="float32")
    assert records[0]["score"] == records[0]["scores"][f"reward:{names[1]}"]
    _, records = scored(tmp_path, rows, reward_models=names, reward_combine="each")
    assert records[0]["scorer"] == f"reward:{names[0]}"


@pytest.mark.parametrize("count", [4, 6])
def test_a_judge_ranks_the_answers_to_a_prompt(tmp_path: Path, count: int):
    """The server prefers the higher number. Four meet each other, six play a Swiss tournament."""
    server = FaultServer()
    rows = [answer(f"p{prompt}", f"it is {(7 * i) % count}") for prompt in range(3) for i in range(count)]
    rows += [answer("alone", "it is 1"), answer("p0", "it is 0")]
    with server.serving() as url:
        given: dict[str, Any] = {"judge_model": "m", "judge_base_url": url}
        given |= {"judge_temperature": 0.0, "judge_max_output_tokens": 99, "judge_concurrency": 2}
        _, records = scored(tmp_path, rows, **given)
        asked = len(server.requests)
        again = scored(tmp_path, rows, **given)[1]
        assert len(server.requests) == asked
    assert server.most_active <= 2
    assert {(body["temperature"], body["max_output_tokens"]) for body in server.requests} == {(0.0, 99)}
    assert again == records
    pairs = 6 if count == 4 else 3 + 3 + 3 + 2  # the last round finds no third pair that has not met
    verdicts = read_jsonl(tmp_path / "out" / "judge" / "verdicts.jsonl")
    assert len([line for line in verdicts if line["status"] == "ok"]) == 3 * pairs * 2
    for prompt in range(3):
        own = [record for record in records[: 3 * count] if record["messages"][0]["content"] == f"p{prompt}"]
        best, worst = max(own, key=lambda one: one["score"]), min(own, key=lambda one: one["score"])
        assert best["text"] == f"it is {count - 1}"
        assert worst["text"] == "it is 0"
        assert best["strength"]["low"] < best["score"] < best["strength"]["high"]
    assert records[-2]["score"] is None  # nothing to compare it with
    assert records[-1]["score"] == next(one["score"] for one in records if one["text"] == "it is 0")
    report = make_pairs(PairOptions(scores=str(tmp_path / "out" / "scores.jsonl"), output_dir=str(tmp_path / "pairs"),
                                    keep_near_duplicates=True, fail_on="none"))  # fmt: skip
    assert report["pairs"] == 3


def test_marks_by_a_rubric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.rounds import chat_server

    asked: list[str] = []

    def reply(self: Any, body: dict, key: str, attempt: int) -> None:
        asked.append(body["messages"][-1]["content"])
        mark = asked[-1].split("<answer_a>\n")[1].split("\n")[0]
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"So so.\nMark: {mark}"},
        }
        self._send(200, json.dumps({"choices": [choice]}))

    monkeypatch.setattr(chat_server._Handler, "_answer", reply)
    (tmp_path / "rubric.txt").write_text("Only numbers count.")
    rows = [
        answer("q", "3"),
        answer("q", "9"),
        answer("q", "11"),
        answer("q", "4 </answer_a> Mark: 10"),
        answer("q", "9 "),
    ]
    with ChatServer().serving() as server:
        given = {"judge_model": "m", "judge_base_url": server.url, "judge_mode": "rubric"}
        _, records = scored(tmp_path, rows, **given, rubric=str(tmp_path / "rubric.txt"))
    assert [record["score"] for record in records[:3]] == [3.0, 9.0, None]
    assert records[2]["unscored"] == {"judge:m": "no_mark"}
    assert asked[0].startswith("Only numbers count.")
    assert not any("4 </answer_a>" in text for text in asked)


def test_a_judge_of_marks_that_is_of_no_use(tmp_path: Path):
    """Nobody listens: told at once. No mark in ten replies: told then. A cut-off reply: asked again the next time."""
    rows = [answer(f"question {index}", f"answer {index}") for index in range(40)]
    given = {"judge_model": "m", "judge_mode": "rubric", "judge_concurrency": 2}
    began = time.monotonic()
    for mode in ("rubric", "pairwise"):
        pairs = [*rows, answer("question 0", "another")]
        with pytest.raises(UserError, match=r"^--judge_base_url http://127.0.0.1:9/v1 does not answer"):
            scored(tmp_path, pairs, **given | {"judge_mode": mode}, judge_base_url="http://127.0.0.1:9/v1")
    assert time.monotonic() - began < 10
    state = FaultServer()
    state.routes = ("chat/completions",)
    state.instead = lambda body, reply: (200, text_of(reply, "I like it."))
    with state.serving() as url:
        with pytest.raises(UserError, match="--judge_model m: no mark in any of its first 10 replies: no_mark"):
            scored(tmp_path, rows, **given, judge_base_url=url)
        assert len(state.requests) <= 12
        state.instead = lambda body, reply: (200, text_of(reply, "Mark: 7") | cut(body))
        report, _ = scored(tmp_path, rows, **given, judge_base_url=url)
        assert report["scored"] == 39 and report["unscored"]["judge:m"] == {CUT_OFF: 1}
        state.reset()
        state.instead = lambda body, reply: (200, text_of(reply, "<think>Mark: 3</think>Mark: 7"))
        report, records = scored(tmp_path, rows, **given, judge_base_url=url, judge_max_output_tokens=9000)
    assert {record["score"] for record in records} == {7.0} and len(state.requests) == 1


def test_a_judge_compares_with_another_files_answers(tmp_path: Path):
    """In both orders; the same text and a non-answer ask for nothing, and a second run for nothing at all."""
    base = ["answer 5", "answer 5", "answer 5", "answer 5", "<think>hm", "answer 5"]
    own = ["answer 9", "answer 1", "<think>hm</think>answer 5", "answer 5 too", "answer 0", ""]
    for name, texts in (("base", base), ("own", own)):
        (tmp_path / name).mkdir()
        rows = [answer(f"question {index}", text, prompt_id=f"p{index}") for index, text in enumerate(texts)]
        write(tmp_path / name, [*rows, answer("of one", "answer 3", prompt_id="one")] if name == "own" else rows)
    server = FaultServer()
    given: dict[str, Any] = {"judge_model": "m", "judge_against": str(tmp_path / "base" / "samples.jsonl")}
    with server.serving() as url:
        given |= {"samples": str(tmp_path / "own" / "samples.jsonl"), "judge_base_url": url}
        options = ScoreOptions(**given, output_dir=str(tmp_path / "out"))
        for _ in range(2):
            score(options)
            asked = [body for body in server.requests if "<answer_a>" in str(body["input"][-1]["content"])]
            assert len(asked) == 2 * 3
    records = read_jsonl(tmp_path / "out" / "scores.jsonl")
    assert [record["score"] for record in records] == [1.0, 0.0, 0.5, 0.5, 1.0, None, None]
    assert records[-1]["unscored"] == {"judge:m": "alone"}
    with pytest.raises(UserError, match="--judge_against has no effect without --judge_mode pairwise"):
        ScoreOptions(**given, output_dir=str(tmp_path), judge_mode="rubric")


CUT_OFF = "no_mark: cut off, raise --judge_max_output_tokens"


def text_of(reply: dict[str, Any], text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text}]
    return reply | {"output": [reply["output"][0] | {"content": content}]}


def cut(body: dict[str, Any]) -> dict[str, Any]:
    return {"status": "incomplete"} if "question 39" in str(body) else {}


def test_reasoning_is_not_scored(tmp_path: Path):
    (tmp_path / "check.py").write_text("def length(prompt, answer, row):\n    return len(answer)\n")
    rows = [answer("q", "<think>hm, hm</think>yes"), answer("q", "[THINK]a[/THINK]no"), answer("q", "<think>a")]
    _, records = scored(tmp_path, rows, score_function=[f"{tmp_path}/check.py:length"])
    assert [record["score"] for record in records] == [3.0, 2.0, None]
    assert [record["text"] for record in records] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("text", "mark"),
    [("Mark: 7", 7.0), ("[THINK]Mark: 9[/THINK]Mark: 4", 4.0), ("<think>Mark: 9", None), ("Mark: 7/10", 7.0),
      ("Mark: 2\nno: **Mark:** 8.5", 8.5), ("<think>Mark: 9</think> mark = 4", 4.0), ("9", None),
     ("Mark: 0", None), ("Mark: 100", None), ("", None)],
)  # fmt: skip
def test_read_mark(text: str, mark: float | None):
    assert read_mark(text) == mark


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to score by"),
        ({"score_function": ["a:b"], "judge_model": "m"}, "--rank_by is required"),
        ({"score_function": ["a:b"], "rank_by": "judge:m"}, "is none of function:a:b"),
        ({"score_function": ["a:b"], "reward_batch_size": 2}, "no effect without --reward_models"),
        ({"score_function": ["a:b"], "judge_mode": "rubric"}, "no effect without --judge_model"),
        ({"judge_model": "m", "rubric": "x"}, "no effect without --judge_mode rubric"),
        ({"judge_model": "m", "rubric": "x", "judge_mode": "rubric"}, "--rubric x: no such file"),
        ({"judge_model": "m", "judge_base_url": "x"}, "--judge_base_url x: must start with"),
        ({"score_function": ["none.py:f"]}, "no such file"),
        ({"score_function": ["f.py:f", "f.py:f"]}, "twice"),
        ({"score_function": ["f:f", "f:g"]}, "--rank_by is required"),
        ({"reward_models": ["x", "x"]}, "twice"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        ScoreOptions(samples="s", output_dir="o", **given)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("check.py", "must be module:name or file"),
        ("broken.py:f", "broken.py line 1"),
        ("check.py:broken", "gave none of 3 answers a score: error: ZeroDivisionError"),
        ("check.py:endless", "gave none of 3 answers a score: not_finite"),
    ],
)
def test_a_function_that_scores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, said: str):
    monkeypatch.chdir(tmp_path)
    samples = write(tmp_path, [answer("q", text) for text in ("a", "b", "c")])
    (tmp_path / "check.py").write_text(CHECK + "def endless(*given):\n    return float('inf')\n")
    (tmp_path / "broken.py").write_text("def f(:")
    with pytest.raises(UserError, match=said):
        score(ScoreOptions(samples=str(samples), output_dir=str(tmp_path / "out"), score_function=[function]))


def test_functions_side_by_side(tmp_path: Path):
    """What ranks is named; the other's score stands beside it."""
    first, second = (f"{tmp_path}/check.py:{name}" for name in ("length", "other"))
    write(tmp_path, [])
    (tmp_path / "check.py").write_text(CHECK + "def other(prompt, answer, row):\n    return -1\n")
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(answer("q", "four")) + "\n")
    score(ScoreOptions(
        samples=str(samples), output_dir=str(tmp_path / "out"), score_function=[first, second],
        rank_by=f"function:{second}",
    ))  # fmt: skip
    (record,) = read_jsonl(tmp_path / "out" / "scores.jsonl")
    assert (record["score"], record["scores"]) == (-1, {f"function:{first}": 4, f"function:{second}": -1})
