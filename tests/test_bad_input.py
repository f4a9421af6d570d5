"""Bad input of every kind, through the scripts: one exact line, exit code 2, and nothing written or overwritten."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

from tandem.errors import AlarmStop, Preempted, TandemExit, UserError, script_main
from tandem.runs import sha256_file
from tests import tiny

ROOT = Path(__file__).parents[1]
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
FORMATS = "hh, prompt_pair, alpaca, orca, messages, sharegpt"
SUFFIXES = ".json, .jsonl, .json.gz, .jsonl.gz, .csv, .parquet"
UNKNOWN_COLUMNS = (
    "no known preference format has the columns {columns}; name it with --data_format "
    f"({FORMATS}) and its columns with --prompt_key, --chosen_key, --rejected_key"
)


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def without(field: str) -> dict[str, str]:
    return {key: value for key, value in GOOD.items() if key != field}


PACKED = gzip.compress(lines(*[GOOD | {"prompt": str(index)} for index in range(500)]))
# Name of the file, its bytes, and what is said of it; {file} is its path. A message that ends in … may go on.
FILES: dict[str, tuple[str, bytes, str]] = {
    "missing column": (
        "a.jsonl",
        lines(without("rejected")),
        "{file} row 1: " + UNKNOWN_COLUMNS.format(columns="prompt, chosen"),
    ),
    "column missing later on": (
        "a.jsonl",
        lines(GOOD, GOOD, without("chosen")),
        "{file} row 3: " + UNKNOWN_COLUMNS.format(columns="prompt, rejected"),
    ),
    "no prompt and no transcript": (
        "a.jsonl",
        lines(without("prompt")),
        "{file} row 1: " + UNKNOWN_COLUMNS.format(columns="chosen, rejected"),
    ),
    "empty completion": (
        "a.jsonl",
        lines(GOOD, GOOD | {"chosen": "  "}),
        "{file} row 2: field 'chosen': the completion is empty",
    ),
    "empty HH answer": (
        "a.jsonl",
        lines({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}),
        "{file} row 1: field 'rejected': the completion is empty",
    ),
    "null": (
        "a.jsonl",
        lines(GOOD, GOOD | {"rejected": None}),
        "{file} row 2: field 'rejected': must be text, not NoneType",
    ),
    "a number": (
        "a.jsonl",
        lines(GOOD | {"chosen": 4}),
        "{file} row 1: " + UNKNOWN_COLUMNS.format(columns="prompt, chosen, rejected"),
    ),
    "half a surrogate": (
        "a.jsonl",
        lines(GOOD | {"chosen": "\ud83d"}),
        "{file} row 1: field 'chosen': has half of a surrogate pair, which is no character",
    ),
    "mixed formats": (
        "a.jsonl",
        lines(GOOD, {"question": "q", "chosen": "a", "rejected": "b"}),
        "{file} row 2: looks like orca, but {file} row 1 looks like prompt_pair; force one with --data_format",
    ),
    "Latin-1": (
        "a.jsonl",
        b'{"prompt": "gr\xfcn", "chosen": "a", "rejected": "b"}\n',
        "{file}: not UTF-8 at byte 14; convert it, for example with iconv",
    ),
    "UTF-16": (
        "a.jsonl",
        lines(GOOD).decode().encode("utf-16"),
        "{file}: not UTF-8 at byte 0; convert it, for example with iconv",
    ),
    "NUL": ("a.jsonl", lines(GOOD)[:5] + b"\0" + lines(GOOD)[5:], "{file}: has NUL bytes, so it is not a text file"),
    "truncated line": (
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "q", "chos',
        "{file} row 2: not JSON: Unterminated string starting at: line 1 column 17 (char 16)",
    ),
    "truncated array": (
        "a.json",
        b'[{"prompt": "q"',
        "{file}: not JSON: Expecting ',' delimiter: line 1 column 16 (char 15)",
    ),
    "a single value": ("a.json", b"5", "{file} row 1: must be an object with columns, not int"),
    "rows that are lists": ("a.json", b'[["q", "a", "b"]]', "{file} row 1: must be an object with columns, not list"),
    "nested without end": ("a.json", b"[" * 100_000, "{file}: not JSON: maximum recursion depth exceeded…"),
    "duplicate keys": (
        "a.jsonl",
        lines(GOOD) + b'{"prompt": "q", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
        "{file} row 2: not JSON: key 'chosen' appears twice",
    ),
    "empty file": ("a.jsonl", b"", "--dataset_name {file}: split train has no rows"),
    "blank lines": ("a.jsonl", b"\n \n", "--dataset_name {file}: split train has no rows"),
    "empty array": ("a.json", b"[]", "--dataset_name {file}: split train has no rows"),
    "header only": ("a.csv", b"prompt,chosen,rejected\n", "--dataset_name {file}: split train has no rows"),
    "short CSV row": (
        "a.csv",
        b"prompt,chosen,rejected\nq,a,b\nq,a\n",
        "{file} row 2: has another number of fields than the header",
    ),
    "long CSV row": (
        "a.csv",
        b"prompt,chosen,rejected\nq,a,b,c\n",
        "{file} row 1: has another number of fields than the header",
    ),
    "open quote in CSV": (
        "a.csv",
        b'prompt,chosen,rejected\nq,a,"b\n',
        "{file} line 2: not CSV: unexpected end of data",
    ),
    "CSV column twice": ("a.csv", b"prompt,chosen,chosen\nq,a,b\n", "{file}: column 'chosen' appears twice"),
    "gzip cut off": (
        "a.jsonl.gz",
        PACKED[:-20],
        "{file}: cannot be read: Compressed file ended before the end-of-stream marker was reached",
    ),
    "gzip with wrong bytes": (
        "a.jsonl.gz",
        PACKED[:60] + b"\xff" * 20 + PACKED[80:],
        "{file}: cannot be read: Error -3 while decom…",
    ),
    "not gzip": ("a.jsonl.gz", lines(GOOD), "{file}: cannot be read: Not a gzipped file (b'{{\"')"),
    "not parquet": ("a.parquet", lines(GOOD), "{file}: not parquet: …"),
    "another suffix": ("a.txt", lines(GOOD), "--dataset_name {file}: not one of " + SUFFIXES),
}


@pytest.fixture
def say(script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`say("dpo", argv)`: the one line a script ends with; it must end with exit code 2."""

    def run(name: str, *argv: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script_main(script(name).main)
        assert stop.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("UserError: ")]
        assert len(errors) == 1
        return errors[0].removeprefix("UserError: ")

    return run


def check(said: str, expected: str) -> None:
    if expected.endswith("…"):
        assert said.startswith(expected[:-1])
    else:
        assert said == expected


@pytest.mark.parametrize("case", FILES)
def test_data_file(tmp_path: Path, say: Callable[..., str], case: str):
    name, content, expected = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    report = tmp_path / "data_report.json"
    report.write_text("old")
    check(say("check_data", "--dataset_name", file, "--report", report), expected.format(file=file))
    assert report.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {name, "data_report.json"}


def test_parquet_that_is_cut_off(tmp_path: Path, say: Callable[..., str]):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), file)
    file.write_bytes(file.read_bytes()[:-30])
    check(say("check_data", "--dataset_name", file), f"{file}: not parquet: …")


def test_data_that_is_not_there(tmp_path: Path, say: Callable[..., str]):
    (tmp_path / "notes.txt").touch()
    empty = f"--dataset_name {tmp_path}: the folder has no {SUFFIXES} file"
    assert say("check_data", "--dataset_name", tmp_path) == empty
    gone = tmp_path / "gone.jsonl"
    assert say("check_data", "--dataset_name", gone) == f"--dataset_name {gone}: no such file or folder"
    gone.symlink_to("/proc/self/mem")  # a file that even root cannot read
    assert say("check_data", "--dataset_name", gone) == f"{gone}: cannot be read: [Errno 5] Input/output error"


def test_a_hub_dataset_without_a_network(say: Callable[..., str]):
    said = say("check_data", "--dataset_name", "nobody/nothing")
    check(said, "--dataset_name nobody/nothing (split train): …")


def test_keys_and_formats(tmp_path: Path, say: Callable[..., str]):
    file = tiny.save_pairs(tmp_path / "a.jsonl", [GOOD])
    for argv, expected in {
        "--chosen_key good": f"{file} row 1: no column 'good', named by a --…_key option (has "
        "prompt, chosen, rejected)",
        "--data_format csv": f"command line: data_format must be one of {FORMATS}, not csv",
        "--data_format orca": f"{file} row 1: column 'question' is missing; columns are prompt, chosen, rejected",
        "--dataset_train_split valid": f"--dataset_name {file}: no split valid (has train); see --val_ratio",
        "--val_ratio 0.5": "--val_ratio: the data has only one prompt, so nothing can be held out",
    }.items():
        assert say("check_data", "--dataset_name", file, *argv.split()) == expected


@pytest.fixture
def inputs(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> dict[str, str]:
    """Names that messages and command lines refer to, with a few things that are not models."""
    (tmp_path / "not_a_model").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "typo.yaml").write_text("beta: 0.1\nbata: 0.2\n")
    (tmp_path / "twice.yaml").write_text("beta: 0.1\nbeta: 0.2\n")
    (tmp_path / "broken.yaml").write_text("beta: [0.1\n")
    (tmp_path / "trl.yaml").write_text("padding_free: true\n")
    return {"model": str(tiny_model), "data": str(tiny_data), "tmp": str(tmp_path)}


TRAIN = "--model_name_or_path {model} --dataset_name {data} --output_dir {tmp}/out"
COMMANDS: dict[str, tuple[str, str, str]] = {
    "no model": (
        "dpo",
        "",
        "--model_name_or_path is required: model folder or Hub name; an adapter's folder goes on training it",
    ),
    "no data": (
        "sft",
        "--model_name_or_path {model}",
        "--dataset_name is required: Hub name, or a .json, .jsonl, .csv or .parquet file (.gz too), or a folder of …",
    ),
    "unknown loss": (
        "dpo",
        TRAIN + " --loss_type dpo",
        "command line: loss_type must be one of sigmoid, hinge, ipo, exo_pair, …",
    ),
    "unknown YAML key": (
        "dpo",
        TRAIN + " --config {tmp}/typo.yaml",
        "--config {tmp}/typo.yaml: unknown option bata; did you mean beta?",
    ),
    "YAML key twice": (
        "dpo",
        TRAIN + " --config {tmp}/twice.yaml",
        "--config {tmp}/twice.yaml: option beta appears twice",
    ),
    "broken YAML": (
        "dpo",
        TRAIN + " --config {tmp}/broken.yaml",
        "--config {tmp}/broken.yaml: not YAML: while parsing a flow sequence…",
    ),
    "no such YAML": (
        "dpo",
        TRAIN + " --config {tmp}/none.yaml",
        "--config {tmp}/none.yaml: cannot be read: No such file or directory",
    ),
    "an option of TRL's": (
        "dpo",
        TRAIN + " --config {tmp}/trl.yaml",
        "--config {tmp}/trl.yaml: unknown option padding_free; "
        "TRL has it, but Tandem has not reviewed it and does not pass it on",
    ),
    "an abbreviation": (
        "dpo",
        TRAIN + " --learning 1",
        "command line: unknown option learning; did you mean learning_rate?",
    ),
    "not a number": ("dpo", TRAIN + " --beta high", "command line: beta must be a number, not 'high'"),
    "smoothing without effect": (
        "dpo",
        TRAIN + " --loss_type ipo --label_smoothing 0.1",
        "--label_smoothing has no effect with --loss_type ipo; …",
    ),
    "fp16 on the CPU": ("dpo", TRAIN + " --fp16", "--fp16 needs an accelerator: use --bf16, or neither, on the CPU"),
    "β outside of its range": (
        "dpo",
        TRAIN + " --beta 2 --beta_control risk",
        "--beta 2.0 is outside of --beta_min 0.01 to --beta_max 1.0",
    ),
    "folder that is no model": (
        "dpo",
        TRAIN.replace("{model}", "{tmp}/not_a_model"),
        "{tmp}/not_a_model: not a model folder: it has no tokenizer_config.json",
    ),
    "model that is a file": ("sft", TRAIN.replace("{model}", "{tmp}/file"), "{tmp}/file: no such model folder"),
    "model that is gone": ("sft", TRAIN.replace("{model}", "{tmp}/gone"), "{tmp}/gone: no such model folder"),
    "reference that is gone": ("dpo", TRAIN + " --reference_model {tmp}/gone", "{tmp}/gone: no such model folder"),
    "output below a file": (
        "dpo",
        TRAIN.replace("{tmp}/out", "{tmp}/file/out"),
        "--output_dir {tmp}/file/out: cannot be made: Not a directory",
    ),
    "merge of no adapter": (
        "merge_lora",
        "--adapter {tmp}/not_a_model --output_dir {tmp}/out",
        "--adapter {tmp}/not_a_model: neither an adapter's folder nor a model's",
    ),
    "nothing to evaluate": (
        "evaluate",
        "--reference_model {model} --dataset_name {data}",
        "nothing to evaluate: give --sft_model, --dpo_model or both",
    ),
    "evaluation of no model": (
        "evaluate",
        "--reference_model {model} --dpo_model {tmp}/not_a_model --dataset_name {data} "
        "--output_file {tmp}/out/results.json",
        "{tmp}/not_a_model: not a model folder: it has no config.json",
    ),
    "comparison with no model": (
        "compare",
        "--base_model {tmp}/gone --finetuned_model {model} --dataset_name {data} --output_dir {tmp}/out",
        "{tmp}/gone: no such model folder",
    ),
    "no temperature": (
        "generate",
        "--model_name_or_path {model} --label dpo --output_dir {tmp}/out --dataset_name {data} --temperature 0",
        "--temperature must be above 0, not 0.0; use --greedy for none",
    ),
}


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, but for the log, which may grow."""
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(tmp_path: Path, say: Callable[..., str], inputs: dict[str, str], case: str):
    name, argv, expected = COMMANDS[case]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("old")
    (tmp_path / "out" / "config.yaml").write_text("old")
    before = contents(tmp_path)
    check(say(name, *argv.format(**inputs).split()), expected.format(**inputs))
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, script, tiny_model: Path, tiny_data: Path
) -> tuple[Path, list[str]]:
    """A finished run's folder, and its command line."""
    folder = tmp_path_factory.mktemp("runs")
    argv = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {folder}/out --max_steps 1"
    argv += f" --ref_cache {folder}/reference --per_device_train_batch_size 4"
    script("dpo").main(argv.split())
    return folder / "out", argv.split()


@pytest.mark.parametrize(
    "change",
    [
        "--model_name_or_path /gone",
        "--dataset_name /gone",
        "--max_length 4",
        "--reference_model /gone",
        "--fp16",
        "--beta 3",
    ],
)
def test_a_finished_run_survives_bad_input(finished: tuple[Path, list[str]], say: Callable[..., str], change: str):
    """Even where it was to be started over: only good input takes its place."""
    folder, argv = finished
    before = contents(folder)
    starting_over = [] if change == "--beta 3" else ["--resume_from_checkpoint", "no"]
    assert say("dpo", *argv, *change.split(), *starting_over)
    assert contents(folder) == before


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (AlarmStop, 3), (Preempted, 75)])
def test_exit_codes(error: type[TandemExit], code: int, capsys: pytest.CaptureFixture[str]):
    def main(argv: list[str]) -> None:
        raise error("two\n lines")

    with pytest.raises(SystemExit) as stop:
        script_main(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{error.__name__}: two lines\n"


def test_in_a_process_of_its_own(tmp_path: Path, tiny_model: Path):
    """What a user's terminal shows, to the byte."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(GOOD, GOOD | {"chosen": ""}))
    argv = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(file), "--output_dir", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}  # a library prints it
    command = [sys.executable, str(ROOT / "scripts" / "sft.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"UserError: {file} row 2: field 'chosen': the completion is empty\n"
