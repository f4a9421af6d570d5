"""DPO on several processes against one process, on the same global batches: the same losses and the same margins."""

import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.errors import UserError
from tandem.monitor.margins import read_margins, read_margins_log
from tests import tiny
from tests.distributed.launches import log_history, run, steps

STEPS = 4
GLOBAL_BATCH = 8
ACCUMULATION = 2
VARIANTS = {"full": "", "lora": "--use_peft true"}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra")


def flags(model: Path, data: Path, folder: Path, cache: Path, processes: int, variant: str) -> list[str]:
    pairs = GLOBAL_BATCH // ACCUMULATION // processes
    common = f"""
        --model_name_or_path {model} --dataset_name {data} --output_dir {folder} --ref_cache {cache} --bf16 false
        --max_steps {STEPS} --logging_steps 1 --learning_rate 1e-3 --save_strategy no
        --per_device_train_batch_size {pairs} --gradient_accumulation_steps {ACCUMULATION}
    """
    options = dict(option.split(maxsplit=1) for option in f"{common} {variant}".split("--") if option.strip())
    return [part for name, value in options.items() for part in (f"--{name}", *value.split())]


@pytest.fixture(scope="module")
def alone(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One process, each variant."""
    folder = tmp_path_factory.mktemp("alone")
    for name, variant in VARIANTS.items():
        script("dpo").main(flags(tiny_model, tiny_data, folder / name, folder / "cache", 1, variant))
    other = f"--reference_model {tiny.save_model(folder / 'other', seed=1)}"
    script("dpo").main(flags(tiny_model, tiny_data, folder / "given", folder / "cache", 1, other))
    return {name: folder / name for name in [*VARIANTS, "given"]}


def margins_of(folder: Path) -> list[np.ndarray]:
    records, _ = read_margins_log(folder / "logs" / "margins")
    return [read_margins(folder / "logs" / "margins" / record["npy"]) for record in records]


# Margins are differences of sums of about 100 nats, which float32 tells apart by 7.6e-6
NATS = 3e-5


def check_equal(one: Path, several: Path, nats: float = NATS) -> None:
    """Losses, gradient norms and each pair's margin, step by step, from the reference itself on."""
    assert steps(one)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    check_close(one, several, nats)


def check_close(one: Path, several: Path, nats: float = NATS) -> None:
    ours, theirs = steps(several), steps(one)
    assert len(ours) == len(theirs) == STEPS
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.01  # it learns: equal losses are not those of a model at rest
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-5)
        assert mine["num_tokens"] == other["num_tokens"]
    for mine, other in zip(margins_of(several), margins_of(one), strict=True):
        assert mine["pair_id"].tolist() == other["pair_id"].tolist()
        np.testing.assert_allclose(mine["margin"], other["margin"], rtol=1e-5, atol=nats)


def trained(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Weights of the model that the folder holds, loaded as anyone would."""
    AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
        return {name: weight for name, weight in model.state_dict().items() if "lora" in name}
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def check_saved(one: Path, several: Path, base: Path) -> None:
    ours, theirs = trained(several, base), trained(one, base)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # Adam divides a gradient by its own size, so rounding in one that is almost zero moves a weight visibly
        assert (ours[name] - weight).abs().mean() < 1e-5, name
        assert ours[name].dtype == weight.dtype


def test_bf16_keeps_the_log_probs_in_float32(alone: dict[str, Path], tiny_model: Path, tiny_data: Path, tmp_path: Path):
    """Rounded to bfloat16, the sums of −45 nats would be multiples of 0.25, and the first loss not ln 2.

    The reference is another model in the second run, which is sharded as well and must change the loss.
    """
    both = flags(tiny_model, tiny_data, tmp_path / "bf16", tmp_path / "cache", 2, "--bf16 true --max_steps 1")
    other = tiny.save_model(tmp_path / "other", seed=1)
    given = flags(tiny_model, tiny_data, tmp_path / "given", tmp_path / "cache", 2, f"--reference_model {other}")
    run("fsdp", 2, ["dpo.py", *both], ["dpo.py", *given])
    (first,) = steps(tmp_path / "bf16")
    exact = steps(alone["full"])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["logps/chosen"] == pytest.approx(exact["logps/chosen"], abs=0.01)
    check_close(alone["given"], tmp_path / "given")


@pytest.mark.parametrize(
    ("config", "processes", "variants"),
    [
        ("ddp", 2, ("lora",)),
        ("fsdp", 2, ("full", "lora")),
        pytest.param("ddp", 2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("fsdp", 4, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("fsdp_multi_node", 2, ("full", "lora"), marks=pytest.mark.slow),  # its checkpoints are in shards
        pytest.param("fsdp_offload", 2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param("deepspeed_zero2", 2, ("full", "lora"), marks=[pytest.mark.slow, needs_deepspeed]),
        pytest.param("deepspeed_zero3", 2, ("full", "lora"), marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_several_processes_train_as_one(
    alone: dict[str, Path],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    config: str,
    processes: int,
    variants: tuple[str, ...],
):
    said = run(
        config,
        processes,
        *(
            ["dpo.py", *flags(tiny_model, tiny_data, tmp_path / name, tmp_path / "cache" / name, processes, variant)]
            for name, variant in VARIANTS.items()
            if name in variants
        ),
    )
    told = " ".join(said.split())
    assert f"processes {processes} on 1 node" in told
    assert "a step dealt so that all processes have as much to do" in told
    assert f"global batch {GLOBAL_BATCH} pairs" in told
    for name in variants:
        check_equal(alone[name], tmp_path / name)
        check_saved(alone[name], tmp_path / name, tiny_model)


@pytest.mark.parametrize(
    ("processes", "variants"),
    [
        (2, ("full",)),
        pytest.param(2, ("full", "lora"), marks=pytest.mark.slow),
        pytest.param(4, ("full", "lora"), marks=pytest.mark.slow),
    ],
)
def test_tensor_parallelism_trains_as_one(
    alone: dict[str, Path],
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    processes: int,
    variants: tuple[str, ...],
):
    """Neighbouring processes have the same pairs, and half of each matrix; the two neighbourhoods share by FSDP."""
    groups = processes // 2
    said = run(
        "ddp",
        processes,
        *(
            ["dpo.py", *flags(tiny_model, tiny_data, tmp_path / name, tmp_path / "cache" / name, groups, own)]
            for name, own in ((name, f"{VARIANTS[name]} --tp_size 2") for name in variants)
        ),
        kind="gpu",
    )
    pairs = GLOBAL_BATCH // ACCUMULATION // groups
    told = " ".join(said.split())
    assert (
        f"global batch {GLOBAL_BATCH} pairs = {pairs} pairs × 2 accumulation × {processes} processes / 2 alike" in told
    )
    for name in variants:
        # Cut matrices add up in another order; −93 nats have float32 neighbours 7.6e-6 away, and a margin is of four
        check_equal(alone[name], tmp_path / name, nats=3e-5)
        check_saved(alone[name], tmp_path / name, tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "fsdp",
        "fsdp_multi_node",
        pytest.param("deepspeed_zero2", marks=needs_deepspeed),
        pytest.param("deepspeed_zero3", marks=needs_deepspeed),
    ],
)
def test_evaluated_and_resumed(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path: Path, config: str
):
    """The cache is emptied before the resumed run, which scores the reference with the policy's first weights and then
    loads the checkpoint's: none of the first may be left."""
    more = "--save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 2"
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    script("dpo").main(flags(tiny_model, tiny_data, one, tmp_path / "own_cache", 1, more))
    again = ["dpo.py", *flags(tiny_model, tiny_data, two, cache, 2, more)]
    run(config, 2, again)
    check_equal(one, two)
    first = trained(two, tiny_model)
    for file in ("manifest.json", "training_metrics.json", "model.safetensors"):
        (two / file).unlink()
    shutil.rmtree(two / "checkpoint-4")
    shutil.rmtree(cache)
    assert "resuming from" in run(config, 2, again)
    check_equal(one, two)
    check_saved(one, two, tiny_model)
    for name, weight in trained(two, tiny_model).items():
        assert torch.equal(weight, first[name]), name
    ours, theirs = (
        [entry["eval_loss"] for entry in log_history(folder) if "eval_loss" in entry] for folder in (two, one)
    )
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_an_adapter_trains_on(
    script: Callable[[str], ModuleType], alone: dict[str, Path], tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    """Its reference is the policy as it begins, its adapter on. Then it is the reference itself, merged on one rank
    alone, of a policy that no reference pass has sharded."""
    begun = alone["lora"]
    cases = {"on": (begun, ""), "given": (tiny_model, f"--reference_model {begun}")}
    several = []
    for name, (model, variant) in cases.items():
        script("dpo").main(flags(model, tiny_data, tmp_path / name / "one", tmp_path / name / "own", 1, variant))
        several.append(flags(model, tiny_data, tmp_path / name / "two", tmp_path / name / "cache", 2, variant))
    run("fsdp", 2, *(["dpo.py", *each] for each in several))
    for name in cases:
        check_close(tmp_path / name / "one", tmp_path / name / "two", nats=2e-5)  # one bit of a log-prob of -128
        check_saved(tmp_path / name / "one", tmp_path / name / "two", tiny_model)
    assert steps(tmp_path / "on" / "one")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_in_shards_becomes_a_folder_that_loads(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, tmp_path: Path, variant: str
):
    """The last checkpoint's is the model that the run has saved."""
    more = f"{VARIANTS[variant]} --save_strategy steps --save_steps {STEPS}"
    out, merged = tmp_path / "out", tmp_path / "merged"
    run("fsdp_multi_node", 2, ["dpo.py", *flags(tiny_model, tiny_data, out, tmp_path / "cache", 2, more)])
    checkpoint = out / f"checkpoint-{STEPS}"
    assert not list(checkpoint.glob("*.safetensors"))
    script("merge_shards").main(["--checkpoint", str(checkpoint), "--output_dir", str(merged)])
    ours, theirs = trained(merged, tiny_model), trained(out, tiny_model)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    next(checkpoint.glob("pytorch_model_fsdp_0/*.distcp")).write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes"):
        script("merge_shards").main(["--checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "other")])
