"""A recipe of another project is converted, planned and trained; what it asks for arrives, and the rest is named."""

from pathlib import Path

import pytest
import yaml

from tandem.commands import convert, dpo
from tests.options.recipes_of_others import FLAT, SECTIONED

RECIPES = FLAT | SECTIONED
# What no config of a training can hold; the line names what to use
NAMED = {
    "hub_model_id", "push_to_hub", "hub_private_repo", "overwrite_output_dir", "margin_plot", "strategy_args",
    "logging_dir", "dtype",
}  # fmt: skip


def converted(name: str, tmp_path: Path, model: Path, data: Path) -> tuple[Path, str]:
    recipe, config = tmp_path / "recipe.yaml", tmp_path / "dpo.yaml"
    recipe.write_text(RECIPES[name].format(model=model, data=data))
    convert.main([str(recipe), "--output", str(config)])
    return config, recipe.read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_becomes_a_config(
    name: str, tmp_path: Path, tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    config, _ = converted(name, tmp_path, tiny_model, tiny_data)
    values = yaml.safe_load(config.read_text())
    assert values["model_name_or_path"] == str(tiny_model)
    assert values["dataset_name"] == str(tiny_data)
    notes = capsys.readouterr().err.splitlines()
    left = {line.split(": ")[2].rpartition(".")[2] for line in notes if line.startswith("note: not taken: ")}
    assert left <= NAMED
    settle = [line for line in notes if line.startswith("note: to settle: ")]
    assert all("--output_dir is required" in line for line in settle)  # which some give on the command line


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_and_trains_four_steps(
    name: str, tmp_path: Path, tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
):
    config, _ = converted(name, tmp_path, tiny_model, tiny_data)
    given = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    dpo.main([*given, "--plan"])
    assert "peak" in capsys.readouterr().out
    dpo.main([*given, "--max_steps", "4"])
    assert (tmp_path / "out" / "manifest.json").exists()
