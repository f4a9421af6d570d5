import ast
import dataclasses
import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DPOTrainer

from tandem.data.options import DataOptions
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.monitor.options import MonitorOptions
from tandem.options.losses import LOSSES, DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.parsing import parse
from tandem.options.training import (
    EngineOptions,
    PlanOptions,
    SFTOptions,
    TrainOptions,
    check_training,
)
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, check, classes


def trl_branches() -> dict[str, str]:
    """TRL's loss functions: the source of each `loss_type == "…"` branch, by name."""
    branches = {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss)))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("loss_type == "):
            branches[ast.literal_eval(node.test.comparators[0])] = ast.unparse(ast.Module(node.body, []))
    return branches


def test_losses_are_those_of_trl():
    assert {name for name, loss in LOSSES.items() if loss.per_pair is None} == set(trl_branches())


def test_smoothed_losses_are_those_whose_formula_has_the_smoothing():
    smoothed = {name for name, body in trl_branches().items() if "self.label_smoothing" in body}
    of_trl = {name for name, loss in LOSSES.items() if loss.smoothed and loss.per_pair is None}
    assert of_trl == smoothed | {"sigmoid"}


@given(
    smoothing=st.floats(0, 0.49),
    weight=st.floats(0.1, 10),
    x=st.lists(st.floats(-20, 20), min_size=1, max_size=8),
)
def test_cdpo_from_the_terms_of_trl(smoothing: float, weight: float, x: list[float]):
    """cDPO is (1 − ε)·(−log σ(x)) + ε·(−log σ(−x)); TRL's terms, weighted and added, must give it."""
    logits = torch.tensor(x, dtype=torch.float64)
    log_sigmoid = torch.nn.functional.logsigmoid
    trl = {
        "sigmoid": -log_sigmoid(logits),
        "robust": (-(1 - smoothing) * log_sigmoid(logits) + smoothing * log_sigmoid(-logits)) / (1 - 2 * smoothing),
    }
    names, weights = DPOOptions(label_smoothing=smoothing, loss_weights=[weight]).trl_losses
    added = sum(w * trl[name] for name, w in zip(names, weights, strict=True))
    formula = -(1 - smoothing) * log_sigmoid(logits) - smoothing * log_sigmoid(-logits)
    torch.testing.assert_close(added, weight * formula, rtol=1e-9, atol=1e-9)


def test_only_sigmoid_is_rewritten_for_smoothing():
    options = DPOOptions(loss_type=["aot", "sigmoid", "sft"], loss_weights=[1.0, 2.0, 3.0], label_smoothing=0.1)
    names, weights = options.trl_losses
    assert names == ["aot", "sigmoid", "robust", "sft"]
    assert weights == pytest.approx([1.0, 2 * 1.8, -2 * 0.8, 3.0])
    assert DPOOptions().trl_losses == (["sigmoid"], [1.0])


TRAIN = {"output_dir": "out"}


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (LoraOptions, {"lora_r": 0}, "--lora_r must be at least 1, not 0"),
        (LoraOptions, {"lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1, not 1.0"),
        (TextOptions, {"max_length": 1}, "--max_length must be at least 2, not 1"),
        (
            TextOptions,
            {"max_prompt_length": 1024},
            "--max_prompt_length must be below --max_length 1024, not 1024",
        ),
        (TrainOptions, TRAIN | {"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
        (TrainOptions, TRAIN | {"logging_steps": 0}, "--logging_steps must be above 0, not 0"),
        (TrainOptions, TRAIN | {"max_train_samples": -1}, "--max_train_samples must be at least 1, not -1"),
        (TrainOptions, TRAIN | {"max_steps": 0}, "--max_steps must be at least 1, or -1 for --num_train_epochs, not 0"),
        (TrainOptions, TRAIN | {"num_train_epochs": 0.0}, "--num_train_epochs must be above 0, not 0.0"),
        (TrainOptions, TRAIN | {"learning_rate": -1.0}, "--learning_rate must not be negative, got -1.0"),
        (TrainOptions, TRAIN | {"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        (TrainOptions, TRAIN | {"eval_steps": 3}, "--eval_steps and --eval_strategy steps need each other"),
        (TrainOptions, TRAIN | {"eval_strategy": "steps"}, "--eval_steps and --eval_strategy steps need each other"),
        (TrainOptions, TRAIN | {"max_eval_samples": 3}, "--max_eval_samples has no effect without --eval_strategy"),
        (TrainOptions, TRAIN | {"report_to": ["none", "wandb"]}, "--report_to none excludes other trackers"),
        (TrainOptions, TRAIN | {"mount_dir": "out/mirror"}, "--mount_dir out/mirror is inside of --output_dir"),
        (TrainOptions, TRAIN | {"optim": "adamw_8bit"}, "--optim adamw_8bit needs bitsandbytes: pip install"),
        (LoraOptions, {"lora_r": 8}, "--lora_r has no effect without --use_peft"),
        (TrainOptions, TRAIN | {"per_device_eval_batch_size": 3}, "--per_device_eval_batch_size has no effect without"),
        (
            TrainOptions,
            TRAIN | {"save_strategy": "epoch", "save_steps": 3},
            "--save_steps has no effect without --save",
        ),
        (TrainOptions, TRAIN | {"save_strategy": "no", "save_total_limit": 1}, "--save_total_limit has no effect with"),
        (
            TrainOptions,
            TRAIN | {"max_steps": 3, "num_train_epochs": 2.0},
            "--num_train_epochs has no effect with --max",
        ),
        (TrainOptions, TRAIN | {"lr_scheduler_type": "constant", "warmup_steps": 3.0}, "--warmup_steps has no effect"),
        (TrainOptions, TRAIN | {"run_name": "a"}, "--run_name has no effect without --report_to"),
        (
            TrainOptions,
            TRAIN | {"debug": True, "max_steps": 5},
            "--max_steps has no effect with --debug, which sets it",
        ),
        (
            TrainOptions,
            TRAIN | {"global_batch_size": 8, "gradient_accumulation_steps": 2},
            "--gradient_accumulation_st",
        ),
        (
            DPOOptions,
            {"loss_type": ["sft"], "f_divergence_type": "forward_kl"},
            "--f_divergence_type has no effect wit",
        ),
        (PlanOptions, {"device_memory_gib": 8.0}, "--device_memory_gib has no effect without --plan"),
        (DataOptions, {"dataset_name": "a/b", "data_seed": 1}, "--data_seed has no effect without --val_ratio or a mi"),
        (DPOOptions, {"beta": 0.0}, "--beta must be above 0, not 0.0"),
        (DPOOptions, {"loss_weights": [1.0, 2.0]}, "--loss_weights has 2 values for 1 --loss_type"),
        (DPOOptions, {"label_smoothing": 0.5}, "--label_smoothing must be at least 0 and below 0.5, not 0.5"),
        (
            DPOOptions,
            {"label_smoothing": 0.1, "loss_type": ["ipo"]},
            "--label_smoothing has no effect with --loss_type ipo; it has with sigmoid, exo_pair, robust, aot, aot_un",
        ),
        (DPOOptions, {"loss_type": ["exo_pair"]}, "--loss_type exo_pair needs --label_smoothing above 0"),
        (DPOOptions, {"ld_alpha": 1.5}, "--ld_alpha must be between 0 and 1, not 1.5"),
        (DPOOptions, {"loss_type": ["simp"]}, "--loss_type simp: no such loss (did you mean simpo?)"),
        (DPOOptions, {"loss_type": ["nowhere:loss"]}, "--loss_type nowhere:loss: there is no module nowhere here"),
        (DPOOptions, {"loss_type": ["gone.py:loss"]}, "--loss_type gone.py:loss: there is no file gone.py"),
        (DPOOptions, {"loss_type": ["math:gone"]}, "--loss_type math:gone: math has no gone"),
        (DPOOptions, {"loss_type": ["math:pi"]}, "--loss_type math:pi: is a float, neither a function nor a Loss"),
        (DPOOptions, {"loss_type": ["simpo"], "reference_model": "x"}, "--reference_model has no effect with --loss_t"),
        (DPOOptions, {"simpo_gamma": 1.0}, "--simpo_gamma has no effect without --loss_type simpo"),
        (DPOOptions, {"discopop_tau": 0.1}, "--discopop_tau has no effect without --loss_type discopop"),
        (
            DPOOptions,
            {"f_alpha_divergence_coef": 0.3},
            "--f_alpha_divergence_coef has no effect without --f_divergence",
        ),
        (
            DPOOptions,
            {"f_divergence_type": "js_divergence", "loss_type": ["aot"]},
            "--f_divergence_type js_divergence g",
        ),
        (DPOOptions, {"use_weighting": True, "loss_type": ["aot"]}, "--use_weighting cannot weight the loss aot"),
        (SamplingOptions, {"temperature": 0.0}, "--temperature must be above 0, not 0.0; use --greedy for none"),
        (SamplingOptions, {"top_p": 1.5}, "--top_p must be above 0 and at most 1, not 1.5"),
        (SamplingOptions, {"max_prompts": 0}, "--max_prompts must be at least 1, not 0"),
    ],
)
def test_refusals(cls: type, given: dict[str, object], message: str):
    with pytest.raises(UserError) as error:
        cls(**given)
    assert str(error.value).startswith(message)


def test_f_divergence_losses_are_those_trl_accepts():
    source = inspect.getsource(DPOTrainer.__init__)
    start = source.index("f_divergence_loss_types = {") + len("f_divergence_loss_types = ")
    accepted = ast.literal_eval(source[start : source.index("}", start) + 1])
    for name in LOSSES:
        given: dict[str, object] = {
            "loss_type": [name, "hinge"],  # beside another: sft alone has no divergence
            "f_divergence_type": "js_divergence",
            "label_smoothing": 0.1 * (name == "exo_pair"),
        }
        if name in accepted:
            DPOOptions(**given)
        else:
            with pytest.raises(UserError, match="f_divergence_type"):
                DPOOptions(**given)


def test_a_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    for name in ("output_dir", "mount_dir"):
        with pytest.raises(UserError, match=f"--{name} .*file: is a file"):
            TrainOptions(**TRAIN | {name: str(tmp_path / "file")})


def test_options_across_classes(tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    model, train = ModelOptions("gpt2"), TrainOptions("out")
    check_training(model, LoraOptions(), train)
    check_training(ModelOptions(str(adapter)), LoraOptions(), train)
    with pytest.raises(UserError, match=r"--model_revision has no effect: .*adapter is a folder"):
        check_training(ModelOptions(str(adapter), model_revision="main"), LoraOptions(), train)
    with pytest.raises(UserError, match="--fp16 needs an accelerator"):
        check_training(model, LoraOptions(), TrainOptions("out", fp16=True, use_cpu=True))
    with pytest.raises(UserError, match="would add an adapter to the adapter"):
        check_training(ModelOptions(str(adapter)), LoraOptions(use_peft=True), train)
    dropped_out = LoraOptions(use_peft=True, lora_dropout=0.1)
    check_training(model, dropped_out, train)
    check_training(model, dropped_out, train, DPOOptions(disable_dropout=False))
    with pytest.raises(UserError, match="would add an adapter to the adapter"):
        check_training(ModelOptions(str(adapter)), dropped_out, train, DPOOptions())


def test_conflicts_are_named_together():
    argv = ["--output_dir", "out", "--lora_r", "8", "--lora_alpha", "4", "--max_eval_samples", "3", "--save_steps", "5"]
    argv += ["--save_strategy", "no", "--loss_type", "sft", "--beta", "0.2", "--ld_alpha", "0.5"]
    with pytest.raises(UserError) as error:
        parse(argv, (LoraOptions, TrainOptions, DPOOptions), prog="dpo.py")
    assert str(error.value) == (
        "--lora_r, --lora_alpha have no effect without --use_peft; "
        "--max_eval_samples has no effect without --eval_strategy; "
        "--save_steps has no effect without --save_strategy steps; "
        "--beta, --ld_alpha have no effect with --loss_type sft, which has no reference"
    )


def test_conflicts_between_classes_are_named_with_those_within(tmp_path: Path):
    """The five of issue 8, a learning rate, and a control's range, in one line."""
    data = tmp_path / "pairs.jsonl"
    data.touch()
    argv = f"--model_name_or_path m --dataset_name {data} --output_dir out --lora_r 8 --eval_strategy steps "
    argv += "--eval_steps 5 --global_batch_size 12 --learning_rate -1e-5 --fp16 --use_cpu --loss_type sft --beta 2 "
    argv += "--beta_control risk"
    with pytest.raises(UserError) as error:
        parse(argv.split(), classes(DPOOptionSet), prog="dpo.py", check=check)
    assert str(error.value) == (
        "--lora_r has no effect without --use_peft; "
        "--learning_rate must not be negative, got -1e-05; "
        "--beta has no effect with --loss_type sft, which has no reference; "
        "--fp16 needs an accelerator: use --bf16, or neither, on the CPU; "
        "--global_batch_size 12 is not a multiple of 8: --per_device_train_batch_size 8 on 1 processes; "
        "--eval_strategy needs held-out pairs: a test split, or --val_ratio; "
        "--beta 2.0 is outside of --beta_min 0.01 to --beta_max 1.0"
    )


@pytest.mark.parametrize("given", [["--val_ratio", "0.1"], ["--dataset_name", "owner/name"]])
def test_held_out_pairs_that_there_may_be(given: list[str], tmp_path: Path):
    (tmp_path / "train.jsonl").touch()
    argv = f"--model_name_or_path m --dataset_name {tmp_path} --output_dir out --eval_strategy epoch".split()
    with pytest.raises(UserError, match=r"^--eval_strategy needs held-out pairs"):
        parse(argv, classes(SFTOptionSet), prog="sft.py", check=check)
    parse([*argv, *given], classes(SFTOptionSet), prog="sft.py", check=check)
    (tmp_path / "test.jsonl").touch()
    parse(argv, classes(SFTOptionSet), prog="sft.py", check=check)


def test_the_global_batch_is_what_all_processes_take_in_a_step():
    train = TrainOptions("out", per_device_train_batch_size=4, global_batch_size=32)
    assert [train.accumulation(processes) for processes in (1, 2, 8)] == [8, 4, 1]
    assert TrainOptions("out", gradient_accumulation_steps=3).accumulation(5) == 3
    with pytest.raises(UserError) as error:
        train.accumulation(3)
    assert str(error.value) == (
        "--global_batch_size 32 is not a multiple of 12: --per_device_train_batch_size 4 on 3 processes"
    )


def test_what_sft_shares_with_dpo_has_the_same_default_but_for_the_learning_rate():
    def defaults(cls: type) -> dict[str, object]:
        return {field.name: field.default for field in dataclasses.fields(cls)}

    assert defaults(TrainOptions).items() <= defaults(SFTOptions).items()
    assert SFTOptions("out").usual_rates == (2e-5, 2e-4)


def test_no_option_is_in_two_groups():
    """A flat YAML could not tell them apart."""
    groups = [
        ModelOptions,
        LoraOptions,
        TextOptions,
        DataOptions,
        TrainOptions,
        DPOOptions,
        EngineOptions,
        MonitorOptions,
    ]
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_an_adapter_may_go_on_from_a_base_in_four_bits(tmp_path: Path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    train, four_bits = TrainOptions("out"), LoraOptions(load_in_4bit=True)
    check_training(ModelOptions(str(folder)), four_bits, train)
    with pytest.raises(UserError, match="--load_in_4bit needs --use_peft or an adapter"):
        check_training(ModelOptions("base"), four_bits, train)
