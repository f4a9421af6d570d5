import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tandem.data.check import findings_to_markdown, run_check, to_markdown, write_fixed
from tandem.data.lint import lint
from tandem.data.options import CheckOptions, DataOptions
from tandem.data.sources import load_pairs, load_splits
from tandem.errors import UserError
from tandem.options.model import TextOptions
from tests import tiny
from tests.data.pairs import pair

TRAIN = [
    pair("q1", "long answer", "short", 1),
    pair("q1", "long answer", "short", 2),
    pair("q2", "same", "same", 3, "b.jsonl"),
    pair("q3", "a", "bcd", 4),
]


def test_tables():
    figures, findings = lint({"train": TRAIN}, None, TextOptions())
    assert "| train | 4 | 3 | prompt_pair 4 | unknown 4 | 0.50 | too few pairs | not counted |" in to_markdown(figures)
    table = findings_to_markdown(findings)
    assert "| warning | duplicates | 25.00% | train: 1 of 4 pairs are there more than once | a.jsonl row 2 |" in table
    assert findings_to_markdown([]) == "The check found nothing."


def test_report_file_and_the_refusal_when_nothing_fits(tmp_path: Path):
    options = CheckOptions(report=str(tmp_path / "data_report.json"))
    with pytest.raises(UserError, match="train: every prompt alone fills --max_length 3"):
        run_check(options, TextOptions(max_length=3), {"train": TRAIN}, tokenizer=tiny.tokenizer())
    report = json.loads((tmp_path / "data_report.json").read_text())
    lost = next(finding for finding in report["findings"] if finding["name"] == "answer_lost")
    assert (lost["level"], lost["count"], lost["share"], len(lost["examples"])) == ("warning", 4, 1.0, 4)
    assert lost["examples"][1]["row"] == 2


@pytest.mark.parametrize(
    ("fail_on", "stops"), [("none", False), ("error", False), ("warning", True), ("note", True)], ids=str
)
def test_fail_on(fail_on: str, stops: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = tmp_path / "data_report.json"
    options = CheckOptions(fail_on=fail_on, report=str(report))
    if not stops:
        run_check(options, TextOptions(), {"train": TRAIN})
        return
    with pytest.raises(UserError) as error:
        run_check(options, TextOptions(), {"train": TRAIN})
    assert str(error.value).startswith(
        f"the data check found what --fail_on {fail_on} stops on: identical (train: 1 of 4"
    )
    assert "b.jsonl row 3: the same text" in str(error.value)
    assert report.exists()
    assert "| warning | identical |" in capsys.readouterr().out


def test_fix_writes_a_folder_that_reads_back_and_leaves_the_old_file(
    tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
):
    rows = tiny.hh_rows(12)
    same = {"chosen": rows[3]["chosen"], "rejected": rows[3]["chosen"]}
    held_out = tiny.hh_rows(4, start=50)
    data = tmp_path / "data"
    data.mkdir()
    tiny.save_pairs(data / "train.jsonl", [*rows, rows[0], same])
    tiny.save_pairs(data / "test.jsonl", held_out)
    before = {path: path.read_bytes() for path in data.iterdir()}
    argv = [
        "--dataset_name",
        str(data),
        "--fix",
        "drop_identical,drop_duplicates",
        "--fixed_dir",
        str(tmp_path / "mended"),
    ]
    script("check_data").main(argv)

    train, test = load_splits(DataOptions(str(tmp_path / "mended")))
    clean, clean_test = load_splits(DataOptions(str(data)))
    assert [row["pair_id"] for row in train] == [row["pair_id"] for row in clean[:12]]
    assert [row["pair_id"] for row in test] == [row["pair_id"] for row in clean_test]
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    assert f"{tmp_path / 'mended' / 'train.jsonl'}: 12 of 14 pairs" in capsys.readouterr().out

    with pytest.raises(UserError, match="is there already, and nothing is overwritten"):
        script("check_data").main(argv)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"fix": ["drop_identicals"], "fixed_dir": "x"},
            "--fix: unknown drop_identicals; did you mean drop_identical?",
        ),
        ({"fix": ["identical"], "fixed_dir": "x"}, "--fix: unknown identical; did you mean drop_identical?"),
        ({"fix": ["drop_identical"]}, "--fix and --fixed_dir need each other"),
        ({"fixed_dir": "x"}, "--fix and --fixed_dir need each other"),
        ({"show": -1}, "--show must not be negative"),
    ],
)
def test_wrong_options(given: dict, message: str):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        CheckOptions(**given)


def test_the_first_pairs_are_shown_by_their_tokens(
    tmp_path: Path, script: Callable[[str], ModuleType], tiny_model: Path
):
    data, report = tiny.save_pairs(tmp_path / "a.jsonl", tiny.hh_rows(4)), tmp_path / "data_report.json"
    asked = f"--dataset_name {data} --tokenizer_name_or_path {tiny_model} --show 2 --report {report} --fail_on none"
    script("check_data").main(asked.split())
    assert len(json.loads(report.read_text())["shown"]) == 2


def test_show_needs_a_tokenizer():
    with pytest.raises(UserError, match="--show needs --tokenizer_name_or_path"):
        CheckOptions(show=1)


def test_the_shipped_sample_has_no_errors():
    from tandem.data.sample import sample_path

    folder = str(Path(str(sample_path("train"))).parent)
    train, held_out = load_splits(DataOptions(folder))
    run_check(CheckOptions(), TextOptions(), {"train": train, "held-out": held_out}, tokenizer=tiny.tokenizer())


def test_rows_that_cannot_be_read_are_in_the_report(
    tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
):
    rows = tiny.hh_rows(4)
    rows[1]["chosen"] = rows[1]["chosen"].rpartition("Assistant:")[0] + "Assistant:"
    data, report = tiny.save_pairs(tmp_path / "a.jsonl", rows), tmp_path / "data_report.json"
    script("check_data").main(["--dataset_name", str(data), "--max_bad_rows", "1", "--report", str(report)])
    (finding,) = (each for each in json.loads(report.read_text())["findings"] if each["name"] == "unreadable")
    assert finding["message"] == "all: 1 of 4 rows cannot be read and are left out, as --max_bad_rows allows"
    assert finding["examples"] == [{"found": f"{data} row 2: field 'chosen': the completion is empty"}]
    assert capsys.readouterr().err.startswith("skipped ")


def test_mended_data_of_several_kinds_can_be_read(tmp_path: Path):
    spoken = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yes"}]
    rows = [pair("q", "a", "b", 1), pair(*spoken, [{"role": "assistant", "content": "no"}], 2), pair("p", "c", "c", 3)]
    options = CheckOptions(fix=["drop_identical"], fixed_dir=str(tmp_path / "mended"))
    run_check(options, TextOptions(), {"train": rows})
    train, _ = load_splits(DataOptions(str(tmp_path / "mended")))
    assert [row["chosen"][0]["content"] for row in train] == ["a", "yes"]


def test_mended_data_keep_what_is_beside_a_pair(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    beside = {"tools": [{"name": "t"}], "chat_template_kwargs": {"k": 1}, "score_chosen": 2.0, "score_rejected": 1.0}
    file.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"} | beside) + "\n")
    pairs = load_pairs(DataOptions(str(file)), "train")
    write_fixed(tmp_path / "fixed", {"train": pairs}, {"train": pairs})
    again = load_pairs(DataOptions(str(tmp_path / "fixed")), "train")
    assert all(again[0][name] == pairs[0][name] for name in ("pair_id", "tools", "chat_template_kwargs", "scores"))
