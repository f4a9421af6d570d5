"""A model's folder is whole: what the base has beside its weights goes along through training and merge."""

import logging
from pathlib import Path

import pytest

from tandem.models.companions import carry
from tandem.models.merge import MergeOptions, merge
from tests import tiny

BESIDE = {
    "preprocessor_config.json": '{"size": 2}',
    "processor_config.json": '{"a": 1}',
    "video_preprocessor_config.json": "{}",
    "LICENSE": "as is",
    "USE_POLICY.md": "be good",
}
NOT_CARRIED = {
    "README.md": "# Base",
    "modeling_x.py": "raise SystemExit",
    "pytorch_model.bin.index.json": "{}",
    "consolidated.pth": "weights",
    "tokenizer.model": "of the base",
    "vocab.json": "{}",
    "train.log": "of the base's training",
    "run.json": "{}",
    "config.yaml": "{}",
    ".gitattributes": "x",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tiny.save_model(tmp_path / "base")
    for name, text in (BESIDE | NOT_CARRIED).items():
        (folder / name).write_text(text)
    (folder / "assets").mkdir()
    return folder


def check(folder: Path) -> None:
    for name, text in BESIDE.items():
        assert (folder / name).read_text() == text, name
    for name, text in NOT_CARRIED.items():
        assert not (folder / name).exists() or (folder / name).read_text() != text, name
    assert not (folder / "assets").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_through_training_and_merge(stage: str, tmp_path: Path, script, base: Path, tiny_data: Path):
    cache = f"--ref_cache {tmp_path}/cache" if stage == "dpo" else ""
    given = f"--model_name_or_path {base} --dataset_name {tiny_data} --max_steps 1 {cache}".split()
    script(stage).main([*given, "--output_dir", str(tmp_path / "full")])
    check(tmp_path / "full")
    script(stage).main([*given, "--output_dir", str(tmp_path / "adapter"), "--use_peft", "true"])
    assert not (tmp_path / "adapter" / "LICENSE").exists()
    merge(MergeOptions(adapter=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged")))
    check(tmp_path / "merged")


def test_what_is_there_stays(tmp_path: Path, base: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "LICENSE").write_text("another")
    assert carry(str(base), None, tmp_path / "out") == sorted(BESIDE.keys() - {"LICENSE"})
    assert (tmp_path / "out" / "LICENSE").read_text() == "another"


def test_a_large_file_is_not_copied(tmp_path: Path, base: Path):
    with open(base / "adapter_of_sorts.json", "wb") as file:
        file.truncate((32 << 20) + 1)
    (tmp_path / "out").mkdir()
    assert "adapter_of_sorts.json" not in carry(str(base), None, tmp_path / "out")


def test_a_hub_that_is_not_reached_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "tandem"):
        assert carry("owner/model", None, tmp_path) == []
    assert "owner/model: its processor's settings and licence, if any, were not fetched" in caplog.text
