"""Whether a name is a path that is not there, or one on the Hub."""

import pytest

from tandem.errors import UserError
from tandem.places import is_hub_name, not_here


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("gpt2", True),
        ("owner/name", True),
        ("runs/sft", False),
        ("outputs/dpo", False),
        ("mine/sft", False),  # mine/ is here
        ("there", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/name/part", False),
        ("owner/../name", False),
        ("owner/name/", False),
        ("", False),
    ],
)
def test_what_may_be_a_hub_name(tmp_path, monkeypatch, name, on_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "there").mkdir()
    assert is_hub_name(name) == on_hub


def test_what_is_not_here_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not_here("owner/name") == "" == not_here("gpt2")
    assert not_here("runs/sft") == "no such folder in runs/, and not to be had from the Hub: "
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    assert not_here("runs/sft") == ""


@pytest.mark.parametrize(
    ("script_name", "line"),
    [
        ("sft", "--model_name_or_path runs/sft --dataset_name {data} --output_dir out"),
        ("generate", "--models a=runs/sft --dataset_name {data} --output_dir out"),
        ("evaluate", "--reference_model runs/sft --sft_model runs/sft --dataset_name {data} --output_file out.json"),
        ("check_data", "--dataset_name runs/sft"),
        ("judge", "--judge_model m --generations_a a --generations_b b --dataset_name runs/sft"),
    ],
)
def test_every_command_says_that_there_is_no_such_folder(tmp_path, monkeypatch, tiny_data, script, script_name, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/sft.*no such folder in runs/"):
        script(script_name).main(line.format(data=tiny_data).split())
