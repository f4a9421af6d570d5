"""Keys and passwords stay where they are: planted ones are looked for in everything that a run shows and leaves."""

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tandem.credentials import hide, hide_key, holds_secret, names_secret
from tandem.errors import UserError, script_main
from tandem.log import logger, logging_to

ROOT = Path(__file__).parents[1]
PLANTED = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHubPlantedToken",
    "OPENAI_API_KEY": "planted-key-of-the-judge",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
PASSWORD = "planted-password"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    yield


def assert_clean(text: bytes, where: object) -> None:
    for secret in (*PLANTED.values(), PASSWORD):
        assert secret.encode() not in text, f"{secret} is in {where}"


def assert_clean_folder(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert_clean(path.read_bytes(), path)
    return len(files)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://me:word@host/v1 and https://tok@hub", "http://[hidden]@host/v1 and https://[hidden]@hub"),
        ("hf_" + "a" * 34 + " sk-proj-" + "b" * 20 + " ghp_" + "c" * 36, "[hidden] [hidden] [hidden]"),
        (
            "a risk-adjusted-return-on-capital of me@host, hf_small",
            "a risk-adjusted-return-on-capital of me@host, hf_small",
        ),
    ],
)
def test_what_looks_like_a_secret(text: str, hidden: str):
    assert hide(text) == hidden
    assert holds_secret(text) == (text != hidden)


def test_values_of_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    monkeypatch.setenv("OTHER_TOKEN", "none")  # a placeholder, and a word
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long")
    assert hide("none of correct horse, false-but-long") == "none of [hidden], false-but-long"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_KEY",
        "SMTP_PASS",
        "MYSQL_PWD",
        "PGPASSWORD",
        "KEY",
        "DB_PASSWD",
        "BLOB_SAS",
    ],
)
def test_variables_that_hold_a_secret(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "correct horse")
    assert hide("no entry with correct horse") == "no entry with [hidden]"
    assert names_secret(name)


def test_what_only_looks_like_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("MONKEY", "COMPASS", "KEYBOARD", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "correct horse")
    for name in ("PWD", "GOOGLE_APPLICATION_CREDENTIALS"):  # the current folder, and a file's name
        monkeypatch.setenv(name, str(tmp_path))
    said = f"correct horse in {tmp_path}"
    assert hide(said) == said


def test_errors_and_logs_hide_them(planted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = f"no access with {PLANTED['HF_TOKEN']} to http://me:{PASSWORD}@host"

    def main(argv: list[str]) -> None:
        raise UserError(said)

    with pytest.raises(SystemExit):
        script_main(main)
    with logging_to(tmp_path):
        logger.warning("retrying: %s", said)
        try:
            raise ValueError(said)
        except ValueError:
            logger.exception("failed")
        logging.getLogger("tandem.judge").warning(said)
    shown = capsys.readouterr()
    assert shown.err.count("[hidden] to http://[hidden]@host") >= 3
    assert_clean((shown.out + shown.err).encode(), "what is shown")
    assert assert_clean_folder(tmp_path) == 1


def test_a_run_leaves_none_behind(
    planted: None,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    tiny_model: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
):
    data, model = f"--dataset_name {tiny_data}", f"--model_name_or_path {tiny_model}"
    script("check_data").main(f"{data} --report {tmp_path}/data_report.json".split())
    script("dpo").main(
        f"{model} {data} --output_dir {tmp_path}/dpo --ref_cache {tmp_path}/cache --max_steps 1 --save_steps 1 "
        "--per_device_train_batch_size 4 --report_to tensorboard".split()
    )
    script("report").main(["--run_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        script("dpo").main(f"{model} {data} --output_dir {tmp_path}/dpo --print_config".split())
    shown = capsys.readouterr()
    assert_clean((shown.out + shown.err).encode(), "what is shown")
    assert assert_clean_folder(tmp_path) > 20


@pytest.mark.parametrize(
    "variables",
    [
        {"JUDGE_BASE_URL": f"http://user:{PASSWORD}@host/v1"},
        {"JUDGE_BASE_URL": f"http://host/v1?key={PASSWORD}"},
        {"DATASET": f"https://{PASSWORD}@host/pairs.jsonl"},
    ],
)
def test_the_pipeline_refuses_addresses_with_a_password(planted: None, tmp_path: Path, variables: dict[str, str]):
    """Before it writes its log or a stage's command, or puts one on a command line."""
    environment = os.environ | {"MODEL_NAME": "model", "JUDGE_MODEL": "judge", "OUTPUT_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [ROOT / "pipelines" / "dpo_pipeline_sanity.sh"], env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"UserError: {next(iter(variables))} holds a user, a password or a query")
    assert_clean((done.stdout + done.stderr).encode(), "what is shown")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["x", "text", "token", "assistant", "output_text", "input_tokens", "completed"])
def test_a_key_that_is_a_word_of_the_interface_leaves_the_reply_readable(key: str):
    reply = {
        "status": "completed",
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A wins"}]}],
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }
    assert json.loads(hide_key(json.dumps(reply), key)) == reply


def test_a_key_that_a_server_repeats_is_not_kept():
    key = "sk-local-01"
    said = hide_key(json.dumps({"text": f"you sent {key}, älter", "more": [{"a": key}]}), key)
    assert json.loads(said) == {"text": "you sent [key], älter", "more": [{"a": "[key]"}]}
    assert hide_key(f"<html>{key}</html>", key) == "<html>[key]</html>"
    assert hide_key("asks-local-012", key) == "asks-local-012", "a part of another word"
    assert hide_key("no key", None) == "no key"
