"""Every option has an entry here: a proof that it changes what the run computes or writes, or a refusal.

An option is proved where it acts: in the configuration that TRL or PEFT is given, the pairs that are read, the tokens,
the arguments of `generate`. An entry that is text names a test elsewhere that shows it. A new option fails until it
has its entry. `python -m tests.options.ignored_options` has the library ignore each option in turn: its proof must
fail.
"""

import ast
import functools
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from trl import DPOConfig

from tandem.answers.backends.options import GenerationOptions
from tandem.answers.compare import CompareOptions, compare
from tandem.answers.generate import generate
from tandem.data.options import DataOptions
from tandem.data.pairs import PairMaker, rendered
from tandem.data.sources import load_held_out, load_pairs, load_splits
from tandem.data.texts import tokenize_pair
from tandem.engine.forward import pair_engine
from tandem.errors import UserError
from tandem.evaluation.benchmark import BenchmarkOptions, run_benchmarks
from tandem.evaluation.evaluate import EvaluateOptions, evaluate
from tandem.launch.ray import launch
from tandem.models.load import load_model
from tandem.models.lora import lora_config
from tandem.models.sampling import SamplingOptions
from tandem.models.scorer import Scorer
from tandem.monitor.options import MonitorOptions
from tandem.options.fields import handed_on, options_of
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.training import EngineOptions, GaudiOptions, SFTOptions, TrainOptions
from tandem.runs import read_jsonl
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet
from tandem.training.preparation import training_data
from tandem.training.settings import as_begun
from tandem.training.stages import trainable, training_arguments
from tandem.training.trainers import gaudi_settings, trl
from tandem.training.trainers.build import Build
from tests import tiny
from tests.judge.fault_server import FaultServer
from tests.stub_hub import StubHub

ROOT = Path(__file__).parents[2]
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
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "optim_args": ("a=1,b=2", {}),
    "adam_beta1": (0.8, {}),
    "adam_beta2": (0.95, {}),
    "adam_epsilon": (1e-6, {}),
    "logging_first_step": (True, {}),
    "eval_delay": (2.0, {"eval_strategy": "epoch"}),
    "eval_on_start": (True, {"eval_strategy": "epoch"}),
    "load_best_model_at_end": (True, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
    "metric_for_best_model": ("eval_rewards/margins", {"eval_strategy": "epoch", "early_stopping_patience": 2}),
    "dataloader_num_workers": (2, {}),
    "ddp_timeout": (60, {}),
    "ddp_find_unused_parameters": (True, {}),
    "full_determinism": (True, {}),
    "neftune_noise_alpha": (5.0, {}),
    "router_aux_loss_coef": (0.1, {}),
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


def trl_arguments(
    monkeypatch: pytest.MonkeyPatch, train: TrainOptions, dpo: DPOOptions, lora: LoraOptions | None = None
) -> DPOConfig:
    """The DPOConfig that a run with these options gives to TRL's trainer."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(trl, "TandemDPOTrainer", lambda **keywords: given.update(keywords))
    others = (EngineOptions(), MonitorOptions(), GaudiOptions())
    run = DPOOptionSet(ModelOptions("m"), lora or LoraOptions(), TextOptions(), DataOptions("d"), train, dpo, *others)
    run = as_begun(run)
    trl.dpo_trainer(Build(run, None, tiny.tokenizer(), training_arguments(run.train, run.model), {}))
    config: DPOConfig = given["args"]
    return config


def trl_config(monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], dpo: dict[str, Any]) -> DPOConfig:
    return trl_arguments(monkeypatch, TrainOptions(**(TRAIN | train)), DPOOptions(**dpo))


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


def test_the_learning_rate_fits_stage_and_mode_where_none_is_given(monkeypatch: pytest.MonkeyPatch):
    rates = {
        (cls, use_peft, *given): trl_arguments(
            monkeypatch, cls(**(TRAIN | given)), DPOOptions(), LoraOptions(use_peft=use_peft)
        ).learning_rate
        for cls in (TrainOptions, SFTOptions)
        for use_peft in (False, True)
        for given in ({}, {"learning_rate": 3e-3})
    }
    assert list(rates.values()) == [1e-6, 3e-3, 1e-5, 3e-3, 2e-5, 3e-3, 2e-4, 3e-3]


def test_the_cpu_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tandem.training.stages.has_accelerator", lambda: True)
    monkeypatch.setattr("tandem.training.stages.check_launch", lambda *given, **more: None)
    used = [
        training_arguments(TrainOptions(**TRAIN, use_cpu=use), ModelOptions("m"))["use_cpu"] for use in (False, True)
    ]
    assert used == [False, True]


def test_gaudis_options_are_flags_of_the_forward():
    names = ("use_flash_attention", "flash_attention_recompute", "flash_attention_causal_mask")
    flags = gaudi_settings.model_flags(
        GaudiOptions(**dict.fromkeys(names, True)), dict.fromkeys(names), lazy=False, window=None
    )
    assert flags == dict.fromkeys(names, True)


@pytest.mark.parametrize(("name", "layout"), [("dpo", "packed"), ("sft", "padded")])
def test_the_layout_is_the_engines(
    name: str,
    layout: str,
    tmp_path: Path,
    script: Callable[[str], ModuleType],
    tiny_model: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """`engine/test_equality.py` is about what it does there."""
    layouts = []

    def watched(**asked: Any) -> Any:
        layouts.append(asked["layout"])
        return pair_engine(**asked)

    monkeypatch.setattr(trl, "pair_engine", watched)
    given = f"--model_name_or_path {tiny_model} --dataset_name {tiny_data} --output_dir {tmp_path}/out --max_steps 1"
    script(name).main([*given.split(), "--layout", layout])
    assert layouts == [layout]


def test_four_bits_are_asked_of_the_model(tiny_model: Path):
    with pytest.raises(UserError, match="--load_in_4bit needs bitsandbytes"):
        trainable(ModelOptions(str(tiny_model)), LoraOptions(use_peft=True, load_in_4bit=True), 1)


def test_tf32_is_handed_to_trl():
    """Not through TRL's configuration: that refuses it where there is no such GPU."""
    assert handed_on(TrainOptions(**TRAIN, tf32=False))["tf32"] is False
    assert handed_on(TrainOptions(**TRAIN))["tf32"] is None


@pytest.mark.parametrize(
    ("given", "metric", "greater"),
    [
        ({}, "eval_loss", False),
        ({"metric_for_best_model": "eval_rewards/accuracies"}, "eval_rewards/accuracies", True),
        (
            {"metric_for_best_model": "eval_rewards/accuracies", "greater_is_better": False},
            "eval_rewards/accuracies",
            False,
        ),
    ],
)
def test_which_evaluation_is_best(given: dict[str, Any], metric: str, greater: bool):
    train = TrainOptions(**TRAIN, eval_strategy="epoch", early_stopping_patience=1, **given)
    arguments = training_arguments(train, ModelOptions("m"))
    assert (arguments["metric_for_best_model"], arguments["greater_is_better"]) == (metric, greater)


# Option → its value, PEFT's name for it, and the value that PEFT is given
LORA_CHANGES: dict[str, tuple[Any, str, Any]] = {
    "lora_exclude_modules": (["q_proj"], "exclude_modules", "q_proj"),
    "lora_target_parameters": (["mlp.experts.gate_up_proj"], "target_parameters", ["mlp.experts.gate_up_proj"]),
    "lora_modules_to_save": (["lm_head"], "modules_to_save", ["lm_head"]),
    "lora_layers_to_transform": ([1], "layers_to_transform", [1]),
    "lora_layers_pattern": (["layers"], "layers_pattern", ["layers"]),
    "lora_rank_pattern": ({"q_proj": 3}, "rank_pattern", {"q_proj": 3}),
    "lora_alpha_pattern": ({"q_proj": 5}, "alpha_pattern", {"q_proj": 5}),
    "lora_bias": (True, "lora_bias", True),
    "use_rslora": (True, "use_rslora", True),
    "use_dora": (True, "use_dora", True),
    "init_lora_weights": ("pissa", "init_lora_weights", "pissa"),
}


@pytest.mark.parametrize("name", LORA_CHANGES)
def test_what_an_adapter_is_reaches_peft(name: str):
    value, theirs, expected = LORA_CHANGES[name]
    also = {"lora_layers_to_transform": [0]} if name == "lora_layers_pattern" else {}
    targets = {"lora_target_modules": ["q_proj", "v_proj"]}
    before, after = (
        lora_config(LoraOptions(use_peft=True, **(also | targets | change))) for change in ({}, {name: value})
    )
    assert before is not None and after is not None
    assert getattr(after, theirs) == expected != getattr(before, theirs)


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
        return tokenize_pair(rendered(pair, TextOptions(**given), tokenizer), tokenizer)

    assert tokens()["prompt_ids"] != tokens(use_chat_template=False)["prompt_ids"]
    assert len(tokens(max_prompt_length=20)["prompt_ids"]) <= 20 < len(tokens()["prompt_ids"])
    counts = Counter[str]()
    assert PairMaker(tokenizer, TextOptions(max_length=500)).make(pair, counts) is not None
    short = PairMaker(tokenizer, TextOptions(max_length=5))
    assert short.make(pair, counts) is None
    with pytest.raises(UserError, match="--max_length 5: no pair keeps any of its answers"):
        short.tell(counts, 1)


def test_held_out_pairs_of_an_evaluation(tiny_data: Path):
    train = SFTOptions(**TRAIN, eval_strategy="epoch", max_train_samples=5, max_eval_samples=3)
    run = SFTOptionSet(
        ModelOptions("m"), LoraOptions(), TextOptions(), DataOptions(str(tiny_data)), train, GaudiOptions()
    )
    assert {name: len(rows) for name, rows in training_data(run, tiny.tokenizer()).splits.items()} == {
        "train_dataset": 5,
        "eval_dataset": 3,
    }


# Sampling and judging


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 5), ("temperature", 0.3), ("top_p", 0.5), ("greedy", True)]
)
def test_sampling_options_change_the_sampling(name: str, value: Any):
    assert SamplingOptions(**{name: value}).sampling != SamplingOptions().sampling


@pytest.fixture
def drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts in each batch that is answered."""
    sizes = []
    draw = Scorer.draw

    def watched(self: Scorer, prompts: list[list[int]], *given: Any) -> Any:
        sizes.append(len(prompts))
        return draw(self, prompts, *given)

    monkeypatch.setattr(Scorer, "draw", watched)
    return sizes


def test_prompts_in_a_batch(tmp_path: Path, tiny_model: Path, drawn_at_a_time: list[int]):
    prompts = [[{"role": "user", "content": f"say {index}"}] for index in range(8)]
    engine = GenerationOptions(batch_size=3)
    generate({"base": str(tiny_model)}, prompts, SamplingOptions(max_new_tokens=2), engine, tmp_path)
    assert drawn_at_a_time == [3, 3, 2]


@pytest.mark.parametrize(("policy", "against"), [("dpo", "base"), ("sft", "base"), ("dpo", "sft"), ("base", "chosen")])
def test_the_sides_of_a_comparison(policy: str, against: str, tmp_path: Path, tiny_model: Path):
    models = {label: str(tiny.save_model(tmp_path / label, seed)) for seed, label in enumerate(("base", "sft", "dpo"))}
    compared = CompareOptions(
        models["base"], models["dpo"], models["sft"], policy, against, shuffle_ab=True, output_dir=str(tmp_path / "out")
    )
    pair = {"prompt": "say a", "chosen": "a", "rejected": "b"}
    results = compare(compared, GenerationOptions(), SamplingOptions(max_new_tokens=4), [pair])
    (question,) = read_jsonl(tmp_path / "out" / "ab_questions.jsonl")
    answers = results["comparisons"][0]["answers"] | {"chosen": "a"}
    assert {question["answer_a"], question["answer_b"]} == {answers[policy], answers[against]}
    assert len(set(answers.values())) == 4


JUDGED = "--judge_model m --calibration_pairs 6 --self_pairs 1 --temperature 0.5 --max_output_tokens 99"


@pytest.fixture
def judged(
    tmp_path: Path, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """`judged("judge", "--option", …)`: the summary of scripts/judge.py in a folder of its own, and what it asked.

    The judge is right on labelled pairs; of the answers to judge, in run/, it prefers whatever it is shown first.
    """
    data = tiny.save_pairs(tmp_path / "data.jsonl", tiny.hh_rows(30))
    for label in ("base", "sft", "dpo"):
        rows = [
            {"prompt_id": str(index), "messages": [{"role": "user", "content": "q"}], "text": f"{label} {index}"}
            for index in range(3)
        ]
        (tmp_path / "run").mkdir(exist_ok=True)
        tiny.save_pairs(tmp_path / "run" / f"generations_{label}.jsonl", rows)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(name: str, *argv: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        server = FaultServer(decide=lambda a, b: "B" if "is better" in a else "A")
        with server.serving() as url:
            files = ["--dataset_name", str(data), "--output_dir", str(tmp_path / name), "--base_url", url]
            sides = [] if "--generations_a" in argv else ["--run_dir", str(tmp_path / "run")]
            script("judge").main([*JUDGED.split(), *files, *sides, *argv])
        return json.loads((tmp_path / f"{name}_summary.json").read_text()), server.requests

    return run


Judged = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


def test_what_the_judge_is_asked(judged: Judged):
    summary, asked = judged("one")
    assert {(body["model"], body["temperature"], body["max_output_tokens"]) for body in asked} == {("m", 0.5, 99)}
    assert summary["accounting"]["labelled"]["verdicts"] == 2 * 6
    assert "changes sides" in summary["conclusion"]
    lenient, again = judged("two", "--max_flip_rate", "1", "--seed", "7")
    assert "changes sides" not in lenient["conclusion"]
    questions = [{body["input"][-1]["content"] for body in bodies} for bodies in (asked, again)]
    assert questions[0] != questions[1]  # other labelled pairs


def test_whose_answers_are_judged(judged: Judged, tmp_path: Path):
    summary, _ = judged("three", "--policy", "sft", "--against", "dpo")
    assert summary["labels"] == {"side_1": "dpo", "side_2": "sft"}
    files = [str(tmp_path / "run" / f"generations_{label}.jsonl") for label in ("sft", "base")]
    summary, _ = judged("four", "--generations_a", files[0], "--generations_b", files[1])
    assert summary["labels"] == {"side_1": "sft", "side_2": "base"}


# Models and data from elsewhere


@pytest.fixture
def model_with_code(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model is a class that its own file defines."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    folder = shutil.copytree(tiny_model, tmp_path / "with_code")
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_model_runs_only_where_it_is_trusted(model_with_code: Path):
    with pytest.raises(UserError, match="with_code: cannot be loaded as a model"):
        load_model(ModelOptions(str(model_with_code)))
    assert type(load_model(ModelOptions(str(model_with_code), trust_remote_code=True))).__name__ == "OwnModel"


READ_ROWS = """
import json, sys
from tandem.data.options import DataOptions
from tandem.data.sources import load_pairs
for given in json.loads(sys.argv[1]):
    print(load_pairs(DataOptions("owner/pairs", **given), "train")[0]["chosen"])
"""


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load(name: str, config: None, *, split: str, revision: str | None) -> list[dict[str, str]]:
        asked.append(revision)
        return [{"prompt": "q", "chosen": "a", "rejected": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda *_, revision: [f"train_of_{revision}", "train"])
    load_pairs(DataOptions("owner/in_process", dataset_revision="v2"), "train")
    assert asked == ["v2"]


def test_configuration_and_revision_of_a_hub_dataset(tmp_path: Path):
    """Two configurations at two revisions, of which each holds a row that no other does."""

    def repository(revision: str) -> dict[str, bytes]:
        card = "configs:\n" + "".join(
            f"- config_name: {name}\n  default: {name == 'one'}\n  data_files: {name}.jsonl\n".lower()
            for name in ("one", "two")
        )
        row = '{{"prompt": "q", "chosen": "{} {}", "rejected": "b"}}\n'
        rows = {f"{name}.jsonl": row.format(name, revision).encode() for name in ("one", "two")}
        return rows | {"README.md": f"---\n{card}---\n".encode()}

    name = "datasets/owner/pairs"
    hub = StubHub({name: repository("main"), f"{name}@v2": repository("v2")})
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {key: value for key, value in os.environ.items() if key not in offline}
    asked = [{}, {"dataset_config": "two"}, {"dataset_revision": "v2"}]
    with hub.serving() as url:
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": url}
        command = [sys.executable, "-c", READ_ROWS, json.dumps(asked)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["one main", "two main", "one v2"], done.stderr


# Evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Callable[..., dict[str, Any]]:
    """`evaluated(option=value)`: the results of a policy against its reference, both random."""
    folder = tmp_path_factory.mktemp("evaluated")
    models = {name: str(tiny.save_model(folder / name, seed)) for seed, name in enumerate(("reference", "dpo"))}
    pairs = load_pairs(DataOptions(str(tiny_data)), "test")

    def run(**given: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"kl_prompts": 4, "kl_max_new_tokens": 8, "eval_bf16": False}
        options |= {"reference_model": models["reference"], "dpo_model": models["dpo"]} | given
        file = folder / "numbers.json"
        file.unlink(missing_ok=True)
        evaluate(EvaluateOptions(output_file=str(file), **options), TextOptions(), pairs)
        results: dict[str, Any] = json.loads(file.read_text())
        return results

    return run


def test_how_much_is_evaluated(evaluated: Callable[..., dict[str, Any]]):
    assert (evaluated()["n_pairs"], evaluated(max_eval_samples=5)["n_pairs"]) == (8, 5)
    assert evaluated(kl_prompts=3)["models"]["dpo"]["kl_per_token"]["n"] == 3
    assert "kl_per_token" not in evaluated(kl_prompts=0)["models"]["dpo"]


def test_how_answers_are_drawn_and_weights_are_held_in_evaluation(evaluated: Callable[..., dict[str, Any]]):
    before = evaluated()["models"]["dpo"]

    def differing(**given: Any) -> set[str]:
        after = evaluated(**given)["models"]["dpo"]
        return {name for name in before if after[name]["value"] != before[name]["value"]}

    drawn = {"kl_per_sequence", "kl_per_token"}
    assert differing(kl_max_new_tokens=2) == drawn
    assert differing(eval_seed=7) == drawn
    assert differing(eval_bf16=True) >= {"mean_margin", "perplexity_chosen"}


def test_pairs_in_a_batch_of_an_evaluation(evaluated: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    rows = []
    token_logps = Scorer._token_logps

    def watched(self: Scorer, batch: dict[str, Any]) -> Any:
        rows.append(len(batch["input_ids"]))
        return token_logps(self, batch)

    monkeypatch.setattr(Scorer, "_token_logps", watched)
    evaluated(eval_batch_size=3, kl_prompts=0)
    assert set(rows) == {6, 4}  # two rows a pair, eight pairs


# Libraries that are not here: what they are asked for


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A package that can be imported, and keeps what its names are called with."""
    module = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_options_reach_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`evaluation/test_benchmark.py` is about the real one, where it is installed."""
    harness, tasks = stand_in("lm_eval", monkeypatch), stand_in("lm_eval.tasks", monkeypatch)
    for module in ("lm_eval.models", "lm_eval.models.huggingface"):
        stand_in(module, monkeypatch)
    harness.simple_evaluate.return_value = {"results": {}}
    options = BenchmarkOptions(["arc_easy"], 3, str(tmp_path), benchmark_fewshot=2, benchmark_chat=True)
    run_benchmarks(options, {"base": lambda: (MagicMock(device="cpu"), None)}, batch_size=8)
    asked = harness.simple_evaluate.call_args.kwargs
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["arc_easy"], 3, 2)
    assert asked["apply_chat_template"] is True
    tasks.TaskManager.assert_called_once_with(include_path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("data_parallel_size", 2), ("tensor_parallel_size", 2), ("enforce_eager", True), ("gpu_memory_utilization", 0.5)],
)
def test_options_reach_vllm(name: str, value: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """`answers/backends/test_vllm.py` is about the real one, where it is installed."""
    arguments = stand_in("vllm.engine.arg_utils", monkeypatch).AsyncEngineArgs
    for module in ("vllm", "vllm.lora.request", "vllm.usage.usage_lib", "vllm.v1.engine.async_llm"):
        stand_in(module, monkeypatch)
    from tandem.answers.backends.vllm import VllmBackend

    engine = VllmBackend([str(tiny_model)], GenerationOptions(backend="vllm", **{name: value}), SamplingOptions())
    engine.load(str(tiny_model))
    engine._loop.close()
    assert arguments.call_args.kwargs[name] == value


def test_options_reach_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`distributed/test_ray.py` is about the real one, where it is installed."""
    ray, train = stand_in("ray", monkeypatch), stand_in("ray.train", monkeypatch)
    stand_in("ray.train.torch", monkeypatch)
    monkeypatch.setattr("tandem.launch.ray.raise_ended", lambda ended: None)
    given = "--num_workers 3 --address auto --cpus_per_worker 2.5 --gpus_per_worker 1 --storage_path s3://bucket "
    given += "--max_failures 7 --reference_workers 4 scripts/dpo.py --model_name_or_path m --dataset_name d"
    monkeypatch.chdir(ROOT)
    launch([*given.split(), "--output_dir", str(tmp_path)])
    assert ray.init.call_args.kwargs["address"] == "auto"
    scaling = {"num_workers": 3, "use_gpu": True, "resources_per_worker": {"CPU": 2.5, "GPU": 1}}
    assert train.ScalingConfig.call_args.kwargs == scaling
    assert train.RunConfig.call_args.kwargs["storage_path"] == "s3://bucket"
    assert train.FailureConfig.call_args.kwargs == {"max_failures": 7}
    assert 4 in [len(call.args[0]) for call in ray.get.call_args_list if isinstance(call.args[0], list)]


# The table

HERE = "options/test_option_effects.py"
TRL = f"{HERE}::test_training_options_reach_trl"
LOSS = f"{HERE}::test_dpo_options_reach_trl"
SPLITS = f"{HERE}::test_splits_and_their_seed"
TEXT = f"{HERE}::test_text_options_change_the_tokens"
SAMPLED = f"{HERE}::test_sampling_options_change_the_sampling"
TAIL = "monitor/test_monitor_options.py::test_arithmetic_gets_what_the_user_set"
ALARM_STOPS = "monitor/test_callback.py::test_other_alarms_stop_after_a_checkpoint"
KEYS = "data/test_sources.py::test_keys"
TEMPLATE = {
    "chat_template": "data/test_templates.py::test_a_template_of_ones_own",
    "chat_template_kwargs": "data/test_templates.py::test_what_the_template_is_told",
    "system_prompt": "data/test_templates.py::test_system_messages_are_folded_or_dropped",
}
RANKED = "judge/test_ranking.py::"
COST = "judge/test_judge_options.py::test_cost_by_hand"
LINE = "test_command_lines.py::"

PAIRED = "rounds/test_pairs.py::"
DRAWN = "rounds/test_sample.py::"
SCORED = "rounds/test_score.py::"
PREPARED = "training/test_preparation.py::"

PROOFS: dict[str, dict[str, str]] = {
    "SampleOptions": {
        "output_dir": f"{DRAWN}test_every_draw_is_there_once_in_order",
        "num_samples": f"{DRAWN}test_every_draw_is_there_once_in_order",
        "parts": f"{DRAWN}test_parts_are_other_prompts",
        "part": f"{DRAWN}test_parts_are_other_prompts",
        "held_out": f"{DRAWN}test_held_out_prompts_are_measured_and_never_paired",
        "with_chosen": f"{DRAWN}test_several_models_and_the_datas_own_answers",
    },
    "RoundsOptions": {
        "run_dir": "rounds/test_measure.py::test_a_row_a_round_by_hand",
        "seed": "rounds/test_measure.py::test_the_seed_of_the_bootstrap",
        "non_answer_score": "rounds/test_measure.py::test_what_a_non_answer_counts",
        "kl_prompts": "rounds/test_divergence.py::test_the_mean_log_ratio_per_answer_and_per_token",
        "kl_batch_size": "rounds/test_divergence.py::test_answers_in_a_batch",
    },
    "ScoreOptions": {
        "samples": f"{SCORED}test_a_function_scores_and_non_answers_get_none",
        "output_dir": f"{SCORED}test_a_function_scores_and_non_answers_get_none",
        "reward_models": f"{SCORED}test_reward_models_are_joined",
        "reward_combine": f"{SCORED}test_reward_models_are_joined",
        "reward_batch_size": f"{SCORED}test_how_a_reward_model_is_run",
        "reward_dtype": f"{SCORED}test_how_a_reward_model_is_run",
        "score_function": f"{SCORED}test_a_function_scores_and_non_answers_get_none",
        "judge_model": f"{SCORED}test_a_judge_ranks_the_answers_to_a_prompt",
        "judge_base_url": f"{SCORED}test_a_judge_ranks_the_answers_to_a_prompt",
        "judge_mode": f"{SCORED}test_marks_by_a_rubric",
        "judge_against": f"{SCORED}test_a_judge_compares_with_another_files_answers",
        "rubric": f"{SCORED}test_marks_by_a_rubric",
        "judge_max_output_tokens": f"{SCORED}test_a_judge_ranks_the_answers_to_a_prompt",
        "judge_concurrency": f"{SCORED}test_a_judge_ranks_the_answers_to_a_prompt",
        "judge_temperature": f"{SCORED}test_a_judge_ranks_the_answers_to_a_prompt",
        "rank_by": f"{SCORED}test_functions_side_by_side",
    },
    "PairOptions": {
        "scores": f"{PAIRED}test_best_and_worst_with_their_provenance",
        "output_dir": f"{PAIRED}test_best_and_worst_with_their_provenance",
        "pair_strategy": f"{PAIRED}test_all_pairs_up_to_a_number",
        "min_score_margin": f"{PAIRED}test_all_pairs_up_to_a_number",
        "max_pairs_per_prompt": f"{PAIRED}test_all_pairs_up_to_a_number",
        "max_length_ratio": f"{PAIRED}test_lengths_are_tokens_where_all_are_known",
        "keep_near_duplicates": f"{PAIRED}test_near_duplicates_are_left_out_unless_kept",
        "round": f"{PAIRED}test_best_and_worst_with_their_provenance",
        "pair_seed": f"{PAIRED}test_the_seed_of_a_random_partner",
        "fail_on": f"{PAIRED}test_the_data_check_stops_on_what_it_is_told_to",
    },
    "TemplateOptions": TEMPLATE,
    "ModelOptions": {
        "model_name_or_path": "training/test_stages.py::test_an_sft_adapter_is_the_reference_of_a_dpo_without_a_merge",
        "model_revision": "options/test_training.py::test_options_across_classes",
        "tokenizer_name_or_path": "models/test_load.py::test_an_adapter_takes_the_tokenizer_of_its_base",
        "dtype": "models/test_load.py::test_dtype",
        "attn_implementation": "models/test_load.py::test_unknown_attention",
        "trust_remote_code": f"{HERE}::test_code_of_a_model_runs_only_where_it_is_trusted",
    },
    "LoraOptions": {
        "use_peft": "training/test_stages.py::test_dpo_begins_at_ln_2_and_learns",
        **dict.fromkeys(
            ("lora_r", "lora_alpha", "lora_target_modules"), "models/test_load.py::test_lora_options_reach_peft"
        ),
        **dict.fromkeys(LORA_CHANGES, f"{HERE}::test_what_an_adapter_is_reaches_peft"),
        "lora_dropout": f"{HERE}::test_lora_dropout_reaches_peft",
        "load_in_4bit": f"{HERE}::test_four_bits_are_asked_of_the_model",
    },
    "TextOptions": {
        **dict.fromkeys(("use_chat_template", "max_prompt_length"), TEXT),
        "max_length": "training/test_stages.py::test_pairs_that_lose_their_answers",
    },
    "PreparationOptions": {
        "dataset_num_proc": f"{PREPARED}test_as_many_processes_as_are_asked_for",
        "token_cache": f"{PREPARED}test_the_folder_of_sets_and_its_size",
        "token_cache_gib": f"{PREPARED}test_the_folder_of_sets_and_its_size",
    },
    "TrainOptions": {
        **dict.fromkeys(TRAIN_CHANGES, TRL),
        "greater_is_better": f"{HERE}::test_which_evaluation_is_best",
        "eval_sets": "training/test_best_model.py::test_several_sets",
        "early_stopping_patience": "training/test_best_model.py::test_early_stopping",
        "wandb_project": "training/test_stages.py::test_trackers_write_without_key_or_network",
        "tf32": f"{HERE}::test_tf32_is_handed_to_trl",
        "global_batch_size": f"{HERE}::test_the_global_batch_size_sets_the_accumulation",
        "fp16": "options/test_training.py::test_options_across_classes",
        "use_cpu": f"{HERE}::test_the_cpu_where_there_is_an_accelerator",
        "tp_size": "training/test_plan.py::test_what_no_plan_counts_is_refused",
        "balance_ranks": "training/test_dealing.py::test_what_depends_on_a_micro_batch_stays",
        "max_train_samples": "training/test_stages.py::test_sft_learns_the_completion_only",
        "max_eval_samples": f"{HERE}::test_held_out_pairs_of_an_evaluation",
        "resume_from_checkpoint": "training/test_stages.py::test_a_named_checkpoint",
        "allow_changed": "training/test_stages.py::test_changed_settings_are_named_and_may_be_allowed",
        "mount_dir": "training/test_stages.py::test_the_mirror_is_a_copy",
        "debug": "training/test_stages.py::test_debug_is_short_and_loud",
    },
    "SFTOptions": {
        **dict.fromkeys(
            ("loss_type", "completion_only_loss", "assistant_only_loss"),
            "training/test_examples.py::test_equals_stock_sft_trainer",
        ),
        "layout": f"{HERE}::test_the_layout_is_the_engines",
        **dict.fromkeys(
            ("packing", "packing_strategy"), "training/test_examples.py::test_rows_are_filled_best_fit_first"
        ),
    },
    "SFTDataOptions": {
        "completion_key": "data/test_examples.py::test_a_column_is_named",
        "text_key": "data/test_examples.py::test_a_text_is_read_whole_even_if_it_looks_like_a_transcript",
    },
    "DPOOptions": {
        **dict.fromkeys(DPO_CHANGES, LOSS),
        "reference_model": "training/test_stages.py::test_the_default_loss_with_smoothing_is_cdpo",
        "simpo_gamma": "training/test_stages.py::test_simpo_is_its_formula",
        **dict.fromkeys(
            ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            "training/trainers/test_synced.py::test_every_logged_number_is_trls",
        ),
    },
    "EngineOptions": {
        "layout": f"{HERE}::test_the_layout_is_the_engines",
        "ref_cache": "training/test_stages.py::test_debug_is_short_and_loud",
        "token_budget": "training/trainers/test_budget.py::test_the_same_training_in_smaller_parts",
    },
    "GaudiOptions": {
        **dict.fromkeys(
            ("use_flash_attention", "flash_attention_causal_mask", "flash_attention_recompute"),
            f"{HERE}::test_gaudis_options_are_flags_of_the_forward",
        ),
    },
    "PlanOptions": {
        "plan": "training/test_plan.py::test_a_plan_of_the_tiny_model",
        "accelerate_config": "training/test_plan.py::test_hardware_of_accelerate_configs",
        "device_memory_gib": "training/test_plan.py::test_what_does_not_fit_gets_the_cheapest_change",
    },
    "DataOptions": {
        "dataset_name": LINE + "test_compare",
        "dataset_config": "data/test_layout.py::test_configurations_of_a_card",
        "dataset_revision": f"{HERE}::test_a_revision_is_asked_of_the_hub",
        **dict.fromkeys(("dataset_train_split", "dataset_test_split", "val_ratio", "data_seed"), SPLITS),
        "row_function": "test_extending.py::test_a_data_format",
        "val_ratio_of": "data/test_mixtures.py::test_only_sources_without_a_held_out_split_are_drawn_from",
        **dict.fromkeys(("data_format", "prompt_key", "chosen_key", "rejected_key", "input_key", "system_key"), KEYS),
        "ignore_columns": "data/test_balance.py::test_what_was_refused_can_be_named_or_left_out",
        "pair_strategy": "data/test_rated.py::test_strategies",
        "score_key": "data/test_rated.py::test_the_score_that_was_named",
        "min_score_margin": "data/test_scores.py::test_min_score_margin",
        "max_bad_rows": "data/test_sources.py::test_bad_rows_up_to_a_limit",
    },
    "CheckOptions": {
        "tokenizer_name_or_path": "data/test_check.py::test_the_first_pairs_are_shown_by_their_tokens",
        "report": LINE + "test_each_script_replays_what_it_saved",
        "show": "data/test_check.py::test_the_first_pairs_are_shown_by_their_tokens",
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
        "alarm_chosen_falling": ALARM_STOPS,
        "alarm_chosen_falling_logs": ALARM_STOPS,
        "alarm_accuracy_pinned": ALARM_STOPS,
        "alarm_accuracy_pinned_logs": ALARM_STOPS,
        "alarm_stuck": ALARM_STOPS,
        "alarm_stuck_steps": ALARM_STOPS,
        "alarm_accuracy_pinned_within": "monitor/test_alarms.py::test_accuracy_pinned",
        "alarm_kl": ALARM_STOPS,
        "alarm_kl_max": ALARM_STOPS,
        "alarm_grad_spike": ALARM_STOPS,
        "alarm_grad_spike_factor": ALARM_STOPS,
    },
    "SamplingOptions": {
        **dict.fromkeys(("max_new_tokens", "temperature", "top_p", "greedy"), SAMPLED),
        "seed": LINE + "test_compare",
        "max_prompts": "answers/test_compare.py::test_side_by_side",
        "max_prompt_length": "answers/test_generate.py::test_long_prompts_are_cut",
    },
    "GenerateOptions": dict.fromkeys(("models", "output_dir"), LINE + "test_each_script_replays_what_it_saved"),
    "GenerationOptions": {
        "backend": "answers/backends/test_openai.py::test_kill_and_go_on",
        "batch_size": f"{HERE}::test_prompts_in_a_batch",
        "dtype": "answers/test_generate.py::test_the_type_of_the_weights",
        "base_url": "answers/backends/test_openai.py::test_kill_and_go_on",
        **dict.fromkeys(
            ("tensor_parallel_size", "data_parallel_size", "enforce_eager", "gpu_memory_utilization"),
            f"{HERE}::test_options_reach_vllm",
        ),
    },
    "CompareOptions": {
        **dict.fromkeys(("base_model", "finetuned_model"), LINE + "test_compare"),
        "sft_model": "answers/test_compare.py::test_side_by_side",
        **dict.fromkeys(("policy", "against", "output_dir"), f"{HERE}::test_the_sides_of_a_comparison"),
        **dict.fromkeys(
            ("shuffle_ab", "ab_verdicts"), "answers/test_compare.py::test_an_outside_judge_who_prefers_the_policy"
        ),
    },
    "EvaluateOptions": {
        **dict.fromkeys(("reference_model", "sft_model", "dpo_model"), LINE + "test_evaluate"),
        "eval_dtype": "evaluation/test_evaluate.py::test_weights_in_bfloat16_give_about_the_same_log_probs",
        **dict.fromkeys(("output_file", "max_eval_samples", "kl_prompts"), f"{HERE}::test_how_much_is_evaluated"),
        "eval_batch_size": f"{HERE}::test_pairs_in_a_batch_of_an_evaluation",
        **dict.fromkeys(
            ("kl_max_new_tokens", "eval_seed", "eval_bf16"),
            f"{HERE}::test_how_answers_are_drawn_and_weights_are_held_in_evaluation",
        ),
    },
    "BenchmarkOptions": dict.fromkeys(
        ("benchmark", "benchmark_limit", "benchmark_tasks", "benchmark_fewshot", "benchmark_chat"),
        f"{HERE}::test_options_reach_the_harness",
    ),
    "MergeOptions": {
        **dict.fromkeys(("adapter", "output_dir"), LINE + "test_each_script_replays_what_it_saved"),
        "base_model": "models/test_merge.py::test_another_base",
        "dtype": "models/test_merge.py::test_dtype",
    },
    "MergeShardsOptions": dict.fromkeys(
        ("checkpoint", "output_dir"), "models/test_merge.py::test_a_checkpoint_in_shards"
    ),
    "JudgeOptions": {
        "judge_backend": "test_extending.py::test_a_judges_backend",
        **dict.fromkeys(
            (
                "judge_model",
                "base_url",
                "output_dir",
                "temperature",
                "max_output_tokens",
                "calibration_pairs",
                "max_flip_rate",
                "seed",
            ),
            f"{HERE}::test_what_the_judge_is_asked",
        ),
        **dict.fromkeys(
            ("run_dir", "policy", "against", "generations_a", "generations_b"), f"{HERE}::test_whose_answers_are_judged"
        ),
        "self_pairs": "judge/test_run.py::test_samples_are_separate_calls",
        "samples": "judge/test_run.py::test_samples_are_separate_calls",
        "max_concurrency": "judge/test_run.py::test_the_concurrency_limit_holds",
        "timeout": "judge/test_run.py::test_a_server_slower_than_the_timeout",
        "max_attempts": "judge/test_run.py::test_a_request_that_failed_for_good_gets_one_more_chance",
        **dict.fromkeys(("price_in", "price_out"), COST),
        "max_cost": "judge/test_run.py::test_max_cost_stops_before_it_is_reached_and_a_higher_one_goes_on",
        "dry_run": "judge/test_run.py::test_a_dry_run_asks_and_writes_nothing_and_bounds_the_cost",
        "batch": "judge/test_run.py::test_batches_give_the_summary_of_single_requests",
        "human_labels": "judge/test_labels.py::test_a_run_is_corrected_by_labels",
        "label_pairs": "judge/test_labels.py::test_no_page_is_written_where_none_is_wanted",
    },
    "RankOptions": {
        **dict.fromkeys(
            ("answers", "judge_model", "base_url"), f"{RANKED}test_a_judge_that_is_not_believed_is_left_out"
        ),
        **dict.fromkeys(
            ("max_prompts", "calibration_pairs", "samples", "temperature", "max_output_tokens", "seed"),
            f"{RANKED}test_what_a_judge_is_asked",
        ),
        **dict.fromkeys(
            ("output_dir", "price_in", "price_out", "max_flip_rate", "max_concurrency", "timeout", "max_attempts"),
            f"{RANKED}test_every_judge_has_its_options",
        ),
        **dict.fromkeys(("max_cost", "dry_run"), f"{RANKED}test_a_budget_and_a_dry_run"),
    },
    "ConvertOptions": {
        "recipe": "options/test_convert.py::test_every_key_is_in_the_file_and_the_file_is_the_config",
        "stage": "options/test_convert.py::test_the_stage_decides_what_is_an_option",
        "output": "options/test_convert.py::test_every_key_is_in_the_file_and_the_file_is_the_config",
    },
    "ReportOptions": {"run_dir": "report/test_page.py::test_whole_run_is_told"},
    "UploadOptions": {
        **dict.fromkeys(
            ("repo_id", "folder", "private"), "report/test_upload.py::test_a_new_repository_is_as_private_as_was_asked"
        ),
        "base_model": "report/test_upload.py::test_an_adapter_on_a_folder_is_refused_or_told_its_base",
        "license": "report/test_upload.py::test_the_card_has_what_the_hub_shows",
        "run_dir": "report/test_upload.py::test_card_carries_results_calibration_and_fingerprint",
        "dry_run": "report/test_upload.py::test_dry_run_names_files_and_shows_the_card",
    },
    "RayOptions": dict.fromkeys(
        (
            "num_workers",
            "address",
            "cpus_per_worker",
            "gpus_per_worker",
            "storage_path",
            "max_failures",
            "reference_workers",
        ),
        f"{HERE}::test_options_reach_ray",
    ),
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
                ast.unparse(field.target)
                for field in fields
                if ast.unparse(field.value or field).startswith(("opt(", "_judges("))
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
def test_every_script_has_only_options_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch):
    class Parsed(Exception):
        pass

    classes: list[type] = []

    def parse(argv: list[str], given: list[type], **_: Any) -> None:
        classes.extend(given)
        raise Parsed

    module = importlib.import_module(f"tandem.commands.{name}")
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
    file, name = proof.split("::")
    assert name in functions(ROOT / "tests" / file)
