"""A finished model stays finished when its card is edited, says which file was changed, and is not trained over."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.models.merge import MergeOptions, merge
from tandem.report.upload import UploadOptions, upload
from tandem.runs import is_complete, sha256_file, write_manifest

Train = Callable[..., None]


@pytest.fixture
def train(run_dpo_script: Train) -> Train:
    few = {"use_peft": "true", "learning_rate": 1e-3, "max_steps": 2, "save_strategy": "no"}
    return lambda out, **flags: run_dpo_script(out, **few | flags)


@pytest.mark.parametrize("by_an_older_version", [False, True])
def test_a_card_may_be_edited(
    train: Train, tmp_path: Path, by_an_older_version: bool, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    train(out)
    if by_an_older_version:  # whose manifests list the card
        manifest = json.loads((out / "manifest.json").read_text())
        manifest["files"]["README.md"] = {"bytes": (out / "README.md").stat().st_size, "xxh3_128": "0"}
        (out / "manifest.json").write_text(json.dumps(manifest))
    before = sha256_file(out / "adapter_model.safetensors")
    with open(out / "README.md", "a") as card:
        card.write("\nWhat it is for.\n")
    (out / "train.log").write_text("")
    assert is_complete(out)
    assert "would push to me/model" in upload(UploadOptions("me/model", str(out), base_model="me/base", dry_run=True))
    merge(MergeOptions(str(out), str(tmp_path / "merged")))
    capsys.readouterr()
    train(out, seed=42)
    assert "already trained with these settings" in capsys.readouterr().err
    assert sha256_file(out / "adapter_model.safetensors") == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file.write_text(file.read_text() + " "), r"adapter_config.json has \d+ bytes, not \d+"),
        (lambda file: file.unlink(), "adapter_config.json is missing"),
    ],
)
def test_a_changed_file_is_named_and_not_trained_over(
    train: Train, tmp_path: Path, change: Callable[[Path], object], says: str
):
    out = tmp_path / "out"
    train(out)
    before = sha256_file(out / "adapter_model.safetensors")
    change(out / "adapter_config.json")
    with pytest.raises(UserError, match=f"--folder {out}: it is not what was trained or merged there: {says}; put the"):
        upload(UploadOptions("me/model", str(out), base_model="me/base", dry_run=True))
    with pytest.raises(UserError, match=f"{out} holds a finished model, but {says}: put that right, choose another"):
        train(out)
    assert sha256_file(out / "adapter_model.safetensors") == before
    train(out, resume_from_checkpoint="no")
    assert is_complete(out)


def test_a_change_of_the_same_size_is_not_merged(train: Train, tmp_path: Path):
    out = tmp_path / "out"
    train(out)
    config = (out / "adapter_config.json").read_text()
    (out / "adapter_config.json").write_text(config.replace('"lora_alpha": 32', '"lora_alpha": 64'))
    assert (out / "adapter_config.json").read_text() != config and is_complete(out)
    with pytest.raises(
        UserError, match=r"--adapter .*: the content of adapter_config.json has changed; put the file back"
    ):
        merge(MergeOptions(str(out), str(tmp_path / "merged")))


def test_a_model_of_another_making_is_not_trained_over(train: Train, tmp_path: Path, tiny_model: Path):
    merged = tmp_path / "merged"
    merge(MergeOptions(str(tiny_model), str(merged)))
    before = sha256_file(merged / "model.safetensors")
    with pytest.raises(UserError, match="holds a finished model, but it does not say which run made it"):
        train(merged)
    assert sha256_file(merged / "model.safetensors") == before


def test_other_settings_need_a_checkpoint_to_go_on_from(train: Train, tmp_path: Path):
    out = tmp_path / "out"
    train(out)
    with pytest.raises(UserError, match="holds a finished model, but it has no checkpoint to go on from with other"):
        train(out, max_steps=4, allow_changed="max_steps")


def test_the_manifest_lists_what_the_model_is_made_of(train: Train, tmp_path: Path):
    from tandem.runs import contents

    train(tmp_path / "out")
    listed = set(contents(tmp_path / "out"))
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run.json"} <= listed
    assert not listed & {"README.md", "train.log", "training_metrics.json", "training_args.bin", "config.yaml"}
    (tmp_path / "folder").mkdir()
    for name in ("README.md", "weights.bin"):
        (tmp_path / "folder" / name).write_text("")
    write_manifest(tmp_path / "folder")
    assert set(contents(tmp_path / "folder")) == {"weights.bin"}
