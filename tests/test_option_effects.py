"""Every option has an entry here: a proof that it changes what the run computes or writes, or a refusal.

An option is proved where it acts: in the configuration that TRL or PEFT is given, the pairs that are read, the tokens,
the arguments of `generate`. An entry that is text names a test elsewhere that shows it. A new option fails until it
has its entry. `NOT_SHOWN` is the list of what is still taken on trust; it may only shrink.
"""

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trl import DPOConfig

from tandem.config import options_of
from tandem.data.options import DataOptions
from tandem.data.sources import load_held_out, load_pairs, load_splits
from tandem.data.texts import render, tokenize_pair
from tandem.errors import UserError
from tandem.judge.calibration import labelled_comparisons
from tandem.models import lora_config
from tandem.monitor.options import MonitorOptions
from tandem.options import DPOOptions, EngineOptions, LoraOptions, ModelOptions, TextOptions, TrainOptions
from tandem.sampling import SamplingOptions
from tandem.trainers import trl
from tandem.training import _arguments, _render, _tokenized_pairs
from tests import tiny

ROOT = Path(__file__).parents[1]
# ray_launch.py hands on the options of another script; its own are RayOptions
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "ray_launch")


# TRL's configuration

TRAIN: dict[str, Any] = {"output_dir": "out", "bf16": False}
# Option → the value it is given, and what else must be given for it to count
TRAIN_CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "output_dir": ("other", {}),
    "num_train_epochs": (2.0, {}),
    "max_steps": (7, {}),
    "per_device_train_batch_size": (3, {}),
    "per_device_eval_batch_size": (3, {"eval_strategy": "epoch"}),
    "gradient_accumulation_steps": (3, {}),
    "learning_rate": (1e-3, {}),
    "lr_scheduler_type": ("cosine", {}),
    "warmup_steps": (5.0, {}),
    "weight_decay": (0.1, {}),
    "max_grad_norm": (0.5, {}),
    "optim": ("adafactor", {}),
    "seed": (7, {}),
    "bf16": (True, {}),
    "gradient_checkpointing": (False, {}),
    "logging_steps": (3, {}),
    "eval_strategy": ("epoch", {}),
    "eval_steps": (4, {"eval_strategy": "steps"}),
    "save_strategy": ("epoch", {}),
    "save_steps": (6, {}),
    "save_total_limit": (1, {}),
    "report_to": (["tensorboard"], {}),
    "run_name": ("a name", {"report_to": ["tensorboard"]}),
}
DPO_CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "beta": (0.5, {}),
    "loss_type": (["ipo"], {}),
    "loss_weights": ([0.5], {}),
    "label_smoothing": (0.1, {"loss_type": ["robust"]}),
    "f_divergence_type": ("forward_kl", {}),
    "f_alpha_divergence_coef": (0.3, {"f_divergence_type": "alpha_divergence"}),
    "ld_alpha": (0.5, {}),
    "discopop_tau": (0.1, {"loss_type": ["discopop"]}),
    "use_weighting": (True, {}),
    "disable_dropout": (False, {}),
}


def trl_config(monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], dpo: dict[str, Any]) -> DPOConfig:
    """The DPOConfig that a run with these options gives to TRL's trainer."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(trl, "TandemDPOTrainer", lambda **keywords: given.update(keywords))
    trl.dpo_trainer(
        None,
        None,
        tiny.tokenizer(),
        _arguments(TrainOptions(**(TRAIN | train)), ModelOptions("m")),
        TextOptions(),
        LoraOptions(),
        DPOOptions(**dpo),
        EngineOptions(),
        MonitorOptions(),
        Path(),
        {},
    )
    return given["args"]


def comparable(value: Any) -> Any:
    return getattr(value, "value", value)  # transformers makes enumerations of some texts


@pytest.mark.parametrize("name", TRAIN_CHANGES)
def test_training_options_reach_trl(name: str, monkeypatch: pytest.MonkeyPatch):
    value, others = TRAIN_CHANGES[name]
    unchanged = {"eval_steps": 9} if name == "eval_steps" else {}  # which must be given where it counts
    before, after = (trl_config(monkeypatch, others | change, {}) for change in (unchanged, {name: value}))
    assert comparable(getattr(after, name)) == value
    assert comparable(getattr(before, name)) != value


@pytest.mark.parametrize("name", DPO_CHANGES)
def test_dpo_options_reach_trl(name: str, monkeypatch: pytest.MonkeyPatch):
    value, others = DPO_CHANGES[name]
    before, after = (trl_config(monkeypatch, {}, others | change) for change in ({}, {name: value}))
    assert getattr(after, name) == value
    assert getattr(before, name) != value


def test_the_global_batch_size_sets_the_accumulation(monkeypatch: pytest.MonkeyPatch):
    asked = {"global_batch_size": 12, "per_device_train_batch_size": 3}
    assert trl_config(monkeypatch, asked, {}).gradient_accumulation_steps == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--global_batch_size 12 is not a multiple of 9"):
        trl_config(monkeypatch, asked, {})


def test_lora_dropout_reaches_peft():
    config = lora_config(LoraOptions(use_peft=True, lora_dropout=0.25))
    assert config is not None
    assert config.lora_dropout == 0.25


# Data and text


def test_splits_and_their_seed(tmp_path: Path):
    tiny.save_pairs(tmp_path / "train.jsonl", tiny.hh_rows(12))
    tiny.save_pairs(tmp_path / "test.jsonl", tiny.hh_rows(4, start=12))

    def ids(**given: Any) -> list[set[str]]:
        return [{pair["pair_id"] for pair in half} for half in load_splits(DataOptions(str(tmp_path), **given))]

    assert list(map(len, ids())) == [12, 4]
    assert list(map(len, ids(dataset_train_split="train[:5]"))) == [5, 4]
    assert list(map(len, ids(dataset_test_split="test[:3]"))) == [12, 3]
    assert list(map(len, ids(val_ratio=0.5))) == [6, 6]
    assert ids(val_ratio=0.5) != ids(val_ratio=0.5, data_seed=1)
    assert len(load_held_out(DataOptions(str(tmp_path), dataset_test_split="test[:3]"))) == 3


def test_text_options_change_the_tokens(tmp_path: Path):
    tokenizer = tiny.tokenizer()
    pair = load_pairs(DataOptions(str(tiny.save_pairs(tmp_path / "a.jsonl", tiny.hh_rows(1)))), "train")[0]

    def tokens(**given: Any) -> Any:
        return tokenize_pair(_render([pair], TextOptions(**given), tokenizer)[0], tokenizer)

    assert tokens()["prompt_ids"] != tokens(use_chat_template=False)["prompt_ids"]
    assert len(tokens(max_prompt_length=20)["prompt_ids"]) <= 20 < len(tokens()["prompt_ids"])
    row = render(pair, True)
    assert len(_tokenized_pairs([row], tokenizer, 500)) == 1
    with pytest.raises(UserError, match="--max_length 5: no pair keeps any of its answers"):
        _tokenized_pairs([row], tokenizer, 5)


# Sampling and judging


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 5), ("temperature", 0.3), ("top_p", 0.5), ("greedy", True)]
)
def test_sampling_options_change_the_arguments_of_generate(name: str, value: Any):
    assert SamplingOptions(**{name: value}).sampling.keywords() != SamplingOptions().sampling.keywords()


def test_the_judges_pairs_and_their_seed(tmp_path: Path):
    pairs = load_pairs(DataOptions(str(tiny.save_pairs(tmp_path / "a.jsonl", tiny.hh_rows(30)))), "train")
    drawn = [labelled_comparisons(pairs, count, seed) for count, seed in ((5, 1), (6, 1), (5, 2))]
    assert list(map(len, drawn)) == [5, 6, 5]
    assert drawn[0] != drawn[2]


# The table

HERE = "test_option_effects.py"
TRL = f"{HERE}::test_training_options_reach_trl"
LOSS = f"{HERE}::test_dpo_options_reach_trl"
SPLITS = f"{HERE}::test_splits_and_their_seed"
TEXT = f"{HERE}::test_text_options_change_the_tokens"
SAMPLED = f"{HERE}::test_sampling_options_change_the_arguments_of_generate"
TAIL = "monitor/test_monitor_options.py::test_arithmetic_gets_what_the_user_set"
ALARM_STOPS = "monitor/test_callback.py::test_other_alarms_stop_after_a_checkpoint"
KEYS = "data/test_sources.py::test_keys"
VERDICT_KEY = "judge/test_requests.py::test_everything_that_a_verdict_depends_on_is_in_the_key"
COST = "judge/test_judge_options.py::test_cost_by_hand"
FILES = "judge/test_judge_options.py::test_files_of_a_run_folder_and_of_two_files"
LINE = "test_command_lines.py::"
NOT_SHOWN = "not shown yet"

PROOFS: dict[str, dict[str, str]] = {
    "ModelOptions": {
        "model_name_or_path": "test_training.py::test_an_sft_adapter_is_the_reference_of_a_dpo_without_a_merge",
        "model_revision": "test_options.py::test_options_across_classes",
        "tokenizer_name_or_path": LINE + "test_accelerate_launch_with_names_of_the_hub",
        "dtype": "test_models.py::test_dtype",
        "attn_implementation": "test_models.py::test_unknown_attention",
        "trust_remote_code": NOT_SHOWN,
    },
    "LoraOptions": {
        "use_peft": "test_training.py::test_dpo_begins_at_ln_2_and_learns",
        **dict.fromkeys(
            ("lora_r", "lora_alpha", "lora_target_modules"), "test_models.py::test_lora_options_reach_peft"
        ),
        "lora_dropout": f"{HERE}::test_lora_dropout_reaches_peft",
        "load_in_4bit": "test_models.py::test_four_bits_need_their_extra",
    },
    "TextOptions": dict.fromkeys(("use_chat_template", "max_length", "max_prompt_length"), TEXT),
    "TrainOptions": {
        **dict.fromkeys(TRAIN_CHANGES, TRL),
        "global_batch_size": f"{HERE}::test_the_global_batch_size_sets_the_accumulation",
        "fp16": "test_options.py::test_options_across_classes",
        "use_cpu": "test_options.py::test_options_across_classes",
        "tp_size": "distributed/test_sharded_equality.py::test_tensor_parallelism_trains_as_one",
        "max_train_samples": "test_training.py::test_sft_learns_the_completion_only",
        "max_eval_samples": "test_training.py::test_evaluation_while_training",
        "resume_from_checkpoint": "test_training.py::test_a_named_checkpoint",
        "allow_changed": "test_training.py::test_changed_settings_are_named_and_may_be_allowed",
        "mount_dir": "test_training.py::test_the_mirror_is_a_copy",
        "debug": "test_training.py::test_debug_is_short_and_loud",
    },
    "SFTOptions": {"learning_rate": "test_options.py::test_sft_differs_from_training_in_its_learning_rate_only"},
    "DPOOptions": {
        **dict.fromkeys(DPO_CHANGES, LOSS),
        "reference_model": "test_training.py::test_the_default_loss_with_smoothing_is_cdpo",
    },
    "EngineOptions": {
        "layout": "engine/test_equality.py::test_layouts_agree",
        "ref_cache": "test_training.py::test_debug_is_short_and_loud",
    },
    "GaudiOptions": {
        **dict.fromkeys(
            ("use_flash_attention", "flash_attention_causal_mask"),
            "trainers/test_gaudi_settings.py::test_flags_of_the_forward",
        ),
        "flash_attention_recompute": "trainers/test_gaudi_settings.py::test_gaudis_options_are_refused_elsewhere",
    },
    "PlanOptions": {
        "plan": "test_plan.py::test_a_plan_of_the_tiny_model",
        "accelerate_config": "test_plan.py::test_hardware_of_accelerate_configs",
        "device_memory_gib": "test_plan.py::test_what_does_not_fit_gets_the_cheapest_change",
    },
    "DataOptions": {
        "dataset_name": LINE + "test_compare",
        "dataset_config": NOT_SHOWN,
        "dataset_revision": NOT_SHOWN,
        **dict.fromkeys(("dataset_train_split", "dataset_test_split", "val_ratio", "data_seed"), SPLITS),
        **dict.fromkeys(("data_format", "prompt_key", "chosen_key", "rejected_key", "input_key", "system_key"), KEYS),
        "max_bad_rows": "data/test_sources.py::test_bad_rows_up_to_a_limit",
    },
    "CheckOptions": {
        "tokenizer_name_or_path": "data/test_check.py::test_report_file_and_the_refusal_when_nothing_fits",
        "report": LINE + "test_each_script_replays_what_it_saved",
        "show": "data/test_check.py::test_show_needs_a_tokenizer",
        "fail_on": "data/test_check.py::test_fail_on",
        **dict.fromkeys(
            ("fix", "fixed_dir"), "data/test_check.py::test_fix_writes_a_folder_that_reads_back_and_leaves_the_old_file"
        ),
    },
    "MonitorOptions": {
        **dict.fromkeys(
            (
                "tail_delta",
                "tail_warmup_steps",
                "tail_ema",
                "tail_test",
                "tail_epsilon",
                "beta_control",
                "beta_min",
                "beta_max",
                "beta_alpha",
                "beta_gamma",
            ),
            TAIL,
        ),
        "alarm_nonfinite": "monitor/test_callback.py::test_warn_goes_on",
        "alarm_chosen_falling": NOT_SHOWN,
        "alarm_chosen_falling_logs": "monitor/test_alarms.py::test_zero_turns_off",
        "alarm_accuracy_pinned": ALARM_STOPS,
        "alarm_accuracy_pinned_logs": ALARM_STOPS,
        "alarm_accuracy_pinned_within": ALARM_STOPS,
        "alarm_kl": NOT_SHOWN,
        "alarm_kl_max": "monitor/test_alarms.py::test_zero_turns_off",
        "alarm_grad_spike": ALARM_STOPS,
        "alarm_grad_spike_factor": ALARM_STOPS,
    },
    "SamplingOptions": {
        **dict.fromkeys(("max_new_tokens", "temperature", "top_p", "greedy"), SAMPLED),
        "seed": LINE + "test_compare",
        "max_prompts": "test_compare.py::test_side_by_side",
        "max_prompt_length": "test_generate.py::test_long_prompts_are_cut",
    },
    "GenerateOptions": dict.fromkeys(("models", "output_dir"), LINE + "test_each_script_replays_what_it_saved"),
    "GenerationOptions": {
        "engine": "generation/test_openai.py::test_kill_and_go_on",
        "batch_size": "generation/test_openai.py::test_options_without_effect",
        "dtype": "test_generate.py::test_the_type_of_the_weights",
        "base_url": "generation/test_openai.py::test_kill_and_go_on",
        "tensor_parallel_size": "generation/test_openai.py::test_options_without_effect",
        "data_parallel_size": NOT_SHOWN,
        "enforce_eager": NOT_SHOWN,
    },
    "CompareOptions": {
        **dict.fromkeys(("base_model", "finetuned_model"), LINE + "test_compare"),
        **dict.fromkeys(("sft_model", "policy", "against"), "test_compare.py::test_side_by_side"),
        **dict.fromkeys(("shuffle_ab", "ab_verdicts"), "test_compare.py::test_an_outside_judge_who_prefers_the_policy"),
        "output_dir": NOT_SHOWN,
    },
    "EvaluateOptions": {
        **dict.fromkeys(("reference_model", "sft_model", "dpo_model", "output_file"), LINE + "test_evaluate"),
        "eval_dtype": "test_evaluate.py::test_weights_in_bfloat16_give_about_the_same_log_probs",
        **dict.fromkeys(
            ("eval_batch_size", "max_eval_samples", "kl_prompts", "kl_max_new_tokens", "eval_seed", "eval_bf16"),
            NOT_SHOWN,
        ),
    },
    "MergeOptions": {
        **dict.fromkeys(("adapter", "output_dir"), LINE + "test_each_script_replays_what_it_saved"),
        "base_model": "test_merge.py::test_another_base",
        "dtype": "test_merge.py::test_dtype",
    },
    "JudgeOptions": {
        "judge_model": VERDICT_KEY,
        "base_url": VERDICT_KEY,
        **dict.fromkeys(("run_dir", "policy", "against", "generations_a", "generations_b"), FILES),
        "output_dir": NOT_SHOWN,
        **dict.fromkeys(("calibration_pairs", "seed"), f"{HERE}::test_the_judges_pairs_and_their_seed"),
        "self_pairs": "judge/test_run.py::test_samples_are_separate_calls",
        "max_flip_rate": "judge/test_calibration.py::test_the_allowed_flip_rate_is_the_callers",
        "samples": "judge/test_run.py::test_samples_are_separate_calls",
        "temperature": VERDICT_KEY,
        "max_output_tokens": VERDICT_KEY,
        "max_concurrency": "judge/test_run.py::test_the_concurrency_limit_holds",
        "timeout": NOT_SHOWN,
        "max_attempts": "judge/test_run.py::test_a_request_that_failed_for_good_gets_one_more_chance",
        **dict.fromkeys(("price_in", "price_out"), COST),
        "max_cost": "judge/test_run.py::test_max_cost_stops_before_it_is_reached_and_a_higher_one_goes_on",
        "dry_run": "judge/test_run.py::test_a_dry_run_asks_and_writes_nothing_and_bounds_the_cost",
        "batch": "judge/test_run.py::test_batches_give_the_summary_of_single_requests",
    },
    "ReportOptions": {"run_dir": "report/test_page.py::test_whole_run_is_told"},
    "UploadOptions": {
        **dict.fromkeys(("repo_id", "folder"), "test_upload.py::test_push_is_one_commit"),
        "run_dir": "test_upload.py::test_card_carries_results_calibration_and_fingerprint",
        "private": NOT_SHOWN,
        "dry_run": "test_upload.py::test_dry_run_names_files_and_shows_the_card",
    },
    "RayOptions": {
        **dict.fromkeys(
            ("num_workers", "gpus_per_worker"), "distributed/test_ray.py::test_a_wrong_command_line_starts_no_cluster"
        ),
        "reference_workers": "distributed/test_ray.py::test_a_killed_worker_leaves_no_trace",
        **dict.fromkeys(("address", "cpus_per_worker", "storage_path", "max_failures"), NOT_SHOWN),
    },
}


def option_classes() -> dict[str, list[str]]:
    """Every dataclass of options in the library and the options it defines, read from the source."""
    found = {}
    for path in (ROOT / "src" / "tandem").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            names = [
                ast.unparse(field.target) for field in fields if ast.unparse(field.value or field).startswith("opt(")
            ]
            if names:
                found[node.name] = names
    return found


CLASSES = option_classes()


def test_every_option_has_an_entry_and_no_entry_is_left_over():
    mixture_source = CLASSES.pop("Source", None)  # of a mixture's file, not of a command line
    assert mixture_source is None or mixture_source == ["weight"]
    assert {cls: sorted(names) for cls, names in CLASSES.items()} == {
        cls: sorted(entries) for cls, entries in PROOFS.items()
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_only_options_of_the_table(
    name: str, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
):
    class Parsed(Exception):
        pass

    classes: list[type] = []

    def parse(argv: list[str], given: list[type], **_: Any) -> None:
        classes.extend(given)
        raise Parsed

    module = script(name)
    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(Parsed):
        module.main([])
    for cls in classes:
        defined = {option for base in cls.__mro__ for option in PROOFS.get(base.__name__, ())}
        assert {option.name for option in options_of(cls)} <= defined


@functools.cache
def functions(path: Path) -> dict[str, str]:
    """Source of each test in a file, decorators included, with the module's constants."""
    text = path.read_text()
    tests = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            tests[node.name] = "\n".join(text.split("\n")[first - 1 : node.end_lineno])
    return tests


@pytest.mark.parametrize("proof", sorted({proof for entries in PROOFS.values() for proof in entries.values()}))
def test_the_tests_named_are_there(proof: str):
    if proof != NOT_SHOWN:
        file, name = proof.split("::")
        assert name in functions(ROOT / "tests" / file)
