"""Every shipped recipe and accelerate config, read by the parser that will read it in earnest."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[1]
# data.yaml is no stage's file: tests/data/test_hub.py reads it
RECIPES = sorted(path for path in (ROOT / "pipelines" / "recipes").glob("*/*.yaml") if path.stem != "data")
ACCELERATE = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
# Options that the pipelines, or the user, put on the command line
GIVEN = {
    "check": "--dataset_name d --tokenizer_name_or_path m",
    "sft": "--model_name_or_path m --dataset_name d --output_dir o",
    "dpo": "--model_name_or_path m --dataset_name d --output_dir o",
    "evaluate": "--reference_model m --dpo_model d --dataset_name d",
    "compare": "--base_model m --finetuned_model d --dataset_name d",
    "judge": "--judge_model j --run_dir r --dataset_name d --base_url http://127.0.0.1:1/v1",
    "sample": "--models policy=m --dataset_name d --output_dir o",
    "held_out": "--models policy=m --dataset_name d --output_dir o",
    "score": "--samples s --output_dir o --score_function m:f",
    "make_pairs": "--scores s --output_dir o",
    "rounds": "--run_dir r",
}
NAMED = {
    "gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_27b", "llama2_7b", "llama2_13b", "llama3_8b", "llama3_70b",
    "qwen3_8b", "smollm3_3b", "gemma4_e2b", "gpt_oss_20b",
}  # fmt: skip


def test_the_recipes_are_there():
    stages = {recipe.parent.name: set() for recipe in RECIPES}
    for recipe in RECIPES:
        stages[recipe.parent.name].add(recipe.stem)
    assert stages.keys() >= NAMED | {"smollm2_135m", "gpt2", "sanity", "default"}
    for name, found in stages.items():
        assert found >= {"sft", "dpo"} or name in ("default", "rounds", "demo_rounds")
    # `config STAGE` of lib.sh takes from `default` what a recipe does not bring
    assert stages["default"] >= set(GIVEN) - {"sft", "dpo", *stages["rounds"]}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe(recipe: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]):
    name = {"check": "check_data", "held_out": "sample"}.get(recipe.stem, recipe.stem)
    with pytest.raises(SystemExit) as stop:
        script(name).main(["--config", str(recipe), *GIVEN[recipe.stem].split(), "--print_config"])
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out.replace("\\", ""))
    assert shown
    for option in yaml.safe_load(recipe.read_text()) or {}:
        assert option in shown


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem in ("sft", "dpo")], ids=str)
def test_a_recipe_trains_alone(recipe: Path, script: Callable[[str], ModuleType]):
    """`make train CONFIG=…` gives nothing else; those of a pipeline's own get model and data from it."""
    argv = ["--config", str(recipe), "--print_config"]
    if recipe.parent.name in ("sanity", "rounds", "demo_rounds"):
        argv += GIVEN[recipe.stem].split()
    with pytest.raises(SystemExit) as stop:
        script(recipe.stem).main(argv)
    assert stop.value.code == 0


def test_the_accelerate_configs_are_there():
    assert {path.stem for path in ACCELERATE} >= {
        "cpu", "single_gpu", "ddp", "fsdp", "fsdp_offload", "fsdp_multi_node", "deepspeed_zero2", "deepspeed_zero3",
    }  # fmt: skip


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_config(path: Path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    written = yaml.safe_load(path.read_text())
    for name, value in written.items():
        if name != "distributed_type":
            assert getattr(config, name) == value
    assert config.mixed_precision == "no"  # --bf16 is the scripts' own


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_config_launches(path: Path):
    """As far as `accelerate launch` goes before it starts a process; a machine without GPUs gets as far."""
    if path.stem.startswith("gaudi"):
        pytest.skip("needs a package that is not installed here")
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    written = yaml.safe_load(path.read_text())
    assert arguments.num_processes == written["num_processes"]
    assert arguments.use_fsdp == (written["distributed_type"] == "FSDP")
    assert arguments.use_deepspeed == (written["distributed_type"] == "DEEPSPEED")
    assert arguments.multi_gpu == (written["distributed_type"] == "MULTI_GPU")
    assert arguments.mixed_precision == "no"
