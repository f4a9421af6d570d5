import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.files import read_rows
from tandem.data.formats import prompt_id
from tandem.data.options import DataOptions
from tandem.data.sources import (
    load_held_out,
    load_pairs,
    load_splits,
    load_training,
    split_by_prompt,
)
from tandem.errors import UserError
from tests.tiny import hh_rows, save_pairs

SHARED = Path(__file__).parents[3] / "shared" / "data"


def pair(index: int) -> dict[str, str]:
    return {"prompt": f"q{index}", "chosen": f"good {index}", "rejected": f"bad {index}"}


ROWS = [pair(index) for index in range(4)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if ".csv" in path.name:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        as_lines = ".jsonl" in path.name
        text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def load(path: Path, split: str = "train", **options: Any) -> list[dict[str, Any]]:
    return load_pairs(DataOptions(str(path), **options), split)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load(path, **options)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str):
    file = write(tmp_path / name, ROWS)
    pairs = load(file)
    assert [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs] == ROWS
    assert [row["row"] for row in pairs] == [1, 2, 3, 4]
    assert {row["source"] for row in pairs} == {str(file)}


@given(st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 3), min_size=1))
def test_csv_fields_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]
):
    """Quotes, commas, newlines and the separators that Unicode knows."""
    file = tmp_path_factory.getbasetemp() / "any.csv"
    dicts = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    write(file, dicts)
    assert [row for _, row in read_rows(file)] == dicts


def test_unquoted_separators_of_unicode_do_not_end_a_csv_row(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text("prompt,chosen,rejected\na\u2028b,c\x0cd,e\x85f\n", encoding="utf-8")
    assert [row for _, row in read_rows(file)] == [{"prompt": "a\u2028b", "chosen": "c\x0cd", "rejected": "e\x85f"}]


def test_jsonl_strings_may_hold_line_separators(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    row = {"prompt": "a\u2028b\x85c", "chosen": "d", "rejected": "e"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert list(read_rows(file)) == [(1, row)]


def test_parquet_lists_of_messages(tmp_path: Path):
    turn = [{"role": "user", "content": "q"}]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": c}],
        }
        for c in "bc"
    ]
    loaded = load(write(tmp_path / "a.parquet", rows))
    assert [row["rejected"] for row in loaded] == [row["rejected"] for row in rows]
    assert loaded[0]["prompt"] == turn


def test_byte_order_mark_and_windows_lines(tmp_path: Path):
    for name, text in {
        "a.jsonl": "\r\n".join(map(json.dumps, ROWS)) + "\r\n",
        "a.csv": "prompt,chosen,rejected\r\nq0,good 0,bad 0\r\n",
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load(tmp_path / name)[0]["chosen"] == "good 0"


def test_a_folder_by_split(tmp_path: Path):
    write(tmp_path / "train-0.jsonl", ROWS[:2])
    write(tmp_path / "train-1.jsonl", ROWS[2:3])
    write(tmp_path / "test.jsonl", ROWS[3:])
    (tmp_path / "notes.txt").write_text("not data")
    options = DataOptions(str(tmp_path))
    train, held_out = load_splits(options)
    assert [row["prompt"] for row in train] == ["q0", "q1", "q2"]
    assert [row["prompt"] for row in held_out] == ["q3"]
    assert [row["row"] for row in train] == [1, 2, 1]
    assert load_training(options) == train
    assert load_held_out(options) == held_out


def test_a_file_that_is_in_no_split_is_not_left_out_in_silence(tmp_path: Path):
    write(tmp_path / "train.jsonl", ROWS[:2])
    write(tmp_path / "more.jsonl", ROWS[2:])
    assert refusal(tmp_path) == (
        f"--dataset_name {tmp_path}: more.jsonl is in no split, as other files are: "
        "name it train…, test…, eval…, valid…, dev…, or move it away"
    )


def test_a_folder_without_split_names_is_all_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.csv", ROWS[2:])
    options = DataOptions(str(tmp_path))
    train, held_out = load_splits(options)
    assert (len(train), held_out) == (4, [])
    assert load_held_out(options) == train
    assert capsys.readouterr().err == f"{tmp_path} has no test split: using all of it\n"


@pytest.mark.parametrize(
    ("split", "prompts"),
    [
        ("train[:2]", "01"),
        ("train[1:3]", "12"),
        ("train[:50%]", "01"),
        ("train[-1:]", "3"),
        ("train[:1]+train[3:]", "03"),
    ],
)
def test_slices(tmp_path: Path, split: str, prompts: str):
    file = write(tmp_path / "a.jsonl", ROWS)
    assert "".join(row["prompt"][1:] for row in load(file, split)) == prompts


def test_keys(tmp_path: Path):
    rows = [{"q": "2+2?", "ctx": "maths", "sys": "Be brief.", "good": "4", "bad": "5"}]
    file = write(tmp_path / "a.jsonl", rows)
    keys = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"}
    assert load(file, **keys)[0]["prompt"] == "2+2?"
    everything = load(file, **keys, input_key="ctx", system_key="sys", data_format="alpaca")[0]
    assert everything["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?\n\nmaths"},
    ]
    assert refusal(file, **keys | {"chosen_key": "god"}) == (
        f"{file} row 1: no column 'god', named by a --…_key option (has q, ctx, sys, good, bad)"
    )
    assert load(file, **keys, input_key="ctx")[0]["prompt"] == "2+2?\n\nmaths"
    answers = {"chosen_key": "good", "rejected_key": "bad"}
    refused = refusal(file, **answers, input_key="ctx", data_format="hh")
    assert refused.startswith("--input_key has no effect with the format hh; force one")
    assert load(file, **keys, system_key="sys")[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    other = write(tmp_path / "b.jsonl", [rows[0] | {"instruction": "i", "chosen": "a", "rejected": "b"}])
    assert load(other, prompt_key="q")[0]["prompt"] == "2+2?"
    assert refusal(other, prompt_key="q", data_format="hh").startswith("--prompt_key has no effect with the format hh")
    with pytest.raises(UserError, match="--chosen_key and --rejected_key both name good"):
        DataOptions(str(file), chosen_key="good", rejected_key="good")


def test_bad_rows_up_to_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], "chosen": ""}, {**ROWS[2], "rejected": None}, ROWS[3]])
    assert refusal(file) == f"{file} row 2: field 'chosen': the completion is empty"
    assert refusal(file, max_bad_rows=1) == (
        f"{file} row 3: field 'rejected': must be text, not null (bad row 2; --max_bad_rows 1)"
    )
    capsys.readouterr()
    assert [row["row"] for row in load(file, max_bad_rows=2)] == [1, 4]
    assert capsys.readouterr().err == (
        f"skipped {file} row 2: field 'chosen': the completion is empty\n"
        f"skipped {file} row 3: field 'rejected': must be text, not null\n"
    )


def test_bad_rows_of_every_kind_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is no JSON, no UTF-8 or of another format leaves the rows around it readable."""
    file = tmp_path / "a.jsonl"
    good = [json.dumps(row).encode() for row in ROWS]
    orca = b'{"question": "q", "chosen": "a", "rejected": "b"}'
    latin1 = b'{"prompt": "gr\xfcn", "chosen": "a", "rejected": "b"}'
    file.write_bytes(b"\n".join([good[0], good[1][:-3], latin1, good[2], orca, b'{"prompt": "q"}', b"7", good[3]]))
    assert [row["row"] for row in load(file, max_bad_rows=5)] == [1, 4, 8]
    skipped = [line.removeprefix(f"skipped {file} row ") for line in capsys.readouterr().err.splitlines()]
    assert [line.split(":")[0] for line in skipped] == ["2", "3", "7", "5", "6"]
    assert refusal(file, max_bad_rows=4).endswith(
        " row 6: column 'chosen' is missing; columns are prompt (bad row 5; --max_bad_rows 4)"
    )
    only_bad = tmp_path / "b.jsonl"
    only_bad.write_bytes(b"{\n")
    assert refusal(only_bad, max_bad_rows=5).startswith(
        f"--dataset_name {only_bad}: split train has no rows but bad ones; "
    )


def test_what_a_file_holds_cannot_act_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(tmp_path / "a.jsonl", [*ROWS, {"\x1b[2J\nUserError: all is well": 1}])
    assert len(load(file, max_bad_rows=1)) == 4
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "columns are \\x1b[2J UserError: all is well" in shown


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=40).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_no_prompt_is_in_both_halves(prompts: list[int], ratio: float, seed: int):
    pairs = [{"prompt": str(prompt), "row": index} for index, prompt in enumerate(prompts)]
    train, held_out = split_by_prompt(pairs, ratio, seed)
    assert sorted(row["row"] for row in train + held_out) == list(range(len(pairs)))
    sides = [{prompt_id(row["prompt"]) for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    distinct = len(set(prompts))
    assert len(sides[1]) == min(distinct - 1, max(1, round(ratio * distinct)))
    assert split_by_prompt(pairs[::-1], ratio, seed)[1] == held_out[::-1]  # order of the rows does not matter


def test_val_ratio_replaces_the_test_split(tmp_path: Path):
    save_pairs(tmp_path / "train.jsonl", hh_rows(8))
    save_pairs(tmp_path / "test.jsonl", hh_rows(4, start=8))
    options = DataOptions(str(tmp_path), val_ratio=0.25)
    train, held_out = load_splits(options)
    assert (len(train), len(held_out)) == (6, 2)
    assert load_training(options) == train
    assert load_held_out(options) == held_out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_ratio": 1.0}, "--val_ratio must be at least 0 and below 1, not 1.0"),
        ({"max_bad_rows": -1}, "--max_bad_rows must not be negative, got -1"),
    ],
)
def test_option_refusals(options: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        DataOptions("x", **options)
    assert str(error.value) == message


def test_one_prompt_cannot_be_split(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[0], "chosen": "other"}])
    with pytest.raises(UserError, match="has only one prompt"):
        load_splits(DataOptions(str(file), val_ratio=0.5))


def test_split_refusals(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", ROWS)
    for split, message in {
        "test": f"--dataset_name {file}: no split test (has train); see --val_ratio",
        "train[3:2]": f"--dataset_name {file}: split train[3:2] has no rows",
    }.items():
        with pytest.raises(UserError) as error:
            load(file, split)
        assert str(error.value) == message
    for split in ("train[:x]", "train[", "train[:200%]"):
        with pytest.raises(UserError, match=r"^split train\["):
            load(file, split)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_hh(capsys: pytest.CaptureFixture[str]):
    file = SHARED / "hh_harmless_base_test_part1.jsonl.gz"
    pairs = load(file, max_bad_rows=20)
    skipped = capsys.readouterr().err.splitlines()
    assert len(pairs) + len(skipped) == 1500
    assert len(skipped) < 10
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    for row in pairs:
        assert row["prompt"][-1]["role"] == "user"
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        # No text is lost or moved: the words of prompt + answer are those of the transcript, in order
        for side in ("chosen", "rejected"):
            whole = " ".join(message["content"] for message in row["prompt"] + row[side])
            transcript = raw[row["row"] - 1][side].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ")
            assert whole.split() == transcript.split()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_sharegpt():
    pairs = load(SHARED / "sharegpt_dpo_en_demo.json.gz")
    assert len(pairs) == 300
    assert all(row["chosen"][0]["content"] != row["rejected"][0]["content"] for row in pairs)


def test_one_object_over_several_lines_is_a_row(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(pair(0), indent=2))
    (row,) = load(tmp_path / "a.json")
    assert (row["chosen"], row["row"]) == ("good 0", 1)


@pytest.mark.parametrize(
    ("limit", "name", "message"),
    [
        ("LONGEST_LINE", "a.jsonl", "row 2: is longer than {} bytes; is it a row a line?"),
        ("LARGEST_DOCUMENT", "a.json", "is larger than {} bytes; make it .jsonl, an object a line"),
    ],
)
def test_what_is_too_large_is_not_read_to_its_end(
    limit: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To the byte."""
    file = write(tmp_path / name, [pair(0), pair(1) | {"chosen": "a longer answer"}])
    longest = max(map(len, file.read_bytes().split(b"\n"))) if name == "a.jsonl" else file.stat().st_size
    monkeypatch.setattr(f"tandem.data.files.{limit}", longest)
    assert len(load(file)) == 2
    monkeypatch.setattr(f"tandem.data.files.{limit}", longest - 1)
    assert refusal(file).endswith(message.format(f"{longest - 1:,}"))


def test_parquet_that_is_damaged_in_its_second_half(tmp_path: Path):
    table = pyarrow.Table.from_pylist([pair(index) for index in range(4000)])
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=2000, compression="none", use_dictionary=False)
    with pyarrow.parquet.ParquetFile(file) as parquet:
        page = parquet.metadata.row_group(1).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:page] + b"\xff" * 64 + content[page + 64 :])
    assert refusal(file).startswith(f"{file} row 2001: not parquet, or a damaged file: ")
