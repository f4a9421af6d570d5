import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tandem.engine.balance import Dealing
from tandem.errors import UserError
from tandem.models.load import load_tokenizer
from tandem.monitor.memory import GIB
from tandem.options.parsing import parse
from tandem.options.training import PlanOptions
from tandem.training.dealing import Order
from tandem.training.hardware import Hardware, read_hardware
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, classes
from tandem.training.plan import Plan, kernels, plan_run
from tandem.training.preparation import training_rows
from tandem.training.rehearsal import Usage
from tests import tiny

ROOT = Path(__file__).parents[2]
ALONE = Hardware("cpu", 1, frozenset(), copies_gradients=False, limit=None, is_here=True)
# Rank 4 on q, k, v, o, gate, up and down of two layers: r x (in + out) each
ADAPTED = ((32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32))
ADAPTER = 2 * sum(4 * (inputs + outputs) for inputs, outputs in ADAPTED)

Planned = Callable[..., str]


@pytest.fixture
def arguments(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """A run on 32 pairs, 4 at a time."""
    out = str(tmp_path / "run")
    files = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tiny_data), "--output_dir", out]
    return [*files, "--bf16", "false", "--gradient_checkpointing", "false", "--per_device_train_batch_size", "4"]


@pytest.fixture
def planned(script: Callable[[str], ModuleType], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Planned:
    """`planned("dpo", "--beta", "1", …)`: what the script prints with `--plan`."""

    def run(name: str, *argv: str) -> str:
        script(name).main(["--plan", *arguments, *argv])
        return capsys.readouterr().out

    return run


@pytest.fixture
def plan(arguments: list[str]) -> Callable[..., Plan]:
    """`plan(DPOOptionSet, "--layout", "packed", …)`: the figures behind the text, on one device of the CPU kind."""

    def make(kind: Any, *argv: str, hardware: Hardware = ALONE) -> Plan:
        run = kind(*parse([*arguments, *argv], classes(kind), prog="plan"))
        return Plan(run, hardware, training_rows(run, load_tokenizer(run.model)), libraries=0)

    return make


def figure(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1].replace(",", ""))


def parameters(tiny_model: Path) -> int:
    # A Llama with tied embeddings: vocabulary x 32, two layers, two norms each, and the last norm
    vocabulary = int(yaml.safe_load((tiny_model / "config.json").read_text())["vocab_size"])
    return vocabulary * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.mark.parametrize(("name", "unit"), [("sft", "examples"), ("dpo", "pairs")])
def test_a_plan_of_the_tiny_model(planned: Planned, tiny_model: Path, tmp_path: Path, name: str, unit: str):
    text = planned(name, "--num_train_epochs", "2", "--gradient_accumulation_steps", "3")
    count = parameters(tiny_model)
    assert f"parameters: {count:,}; trained: {count:,} (100.00%)" in text
    # 8 micro-batches of 4 pairs make 3 steps of up to 3, twice
    assert f"steps: 6 of 4 x 3 x 1 {unit}" in text
    assert "fits: " in text
    assert re.search(r"time: \d+ s of training" + (", .* of the reference" if name == "dpo" else "$"), text, re.M)
    assert not (tmp_path / "run").exists()


def test_lora_trains_a_share(planned: Planned):
    assert figure(planned("dpo", "--use_peft", "true", "--lora_r", "4"), r"trained: ([\d,]+) ") == ADAPTER


@pytest.mark.parametrize(
    ("name", "layout"), [("sft", "padded"), ("dpo", "padded"), ("dpo", "packed"), ("dpo", "shared")]
)
def test_the_run_forwards_as_many_tokens_as_planned(
    planned: Planned,
    plan: Callable[..., Plan],
    script: Callable[[str], ModuleType],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: str,
):
    """Micro-batch by micro-batch: the same pairs, in the same order, cut and padded alike."""
    rows = tiny.hh_rows(32)
    for row in rows:  # both answers begin alike, which the shared layout forwards once
        for side, text in row.items():
            row[side] = "Assistant: the".join(text.rsplit("Assistant:", 1))
    data = tiny.save_pairs(tmp_path / "alike.jsonl", rows)
    flags = ["--dataset_name", str(data), "--max_length", "70"]
    flags += ["--num_train_epochs", "1.5", "--gradient_accumulation_steps", "3"]
    flags += ["--layout", layout] if name == "dpo" else []
    forwarded = []
    embed = torch.nn.Embedding.forward

    def recorded(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():  # else it is the reference, or a probe
            forwarded.append(ids.numel())
        return embed(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", recorded)
    cache = ["--ref_cache", str(tmp_path / "cache")] if name == "dpo" else []
    script(name).main([*arguments, *flags, *cache, "--save_strategy", "no"])
    monkeypatch.undo()

    figures = plan(SFTOptionSet if name == "sft" else DPOOptionSet, *flags)
    # An epoch has 3 + 3 + 2 micro-batches, and half a second one is two steps of 3
    assert [len(batches) for batches in figures.schedule.batches] == [3, 3, 2, 3, 3]
    assert forwarded == [figures.schedule.tokens(batch) for batches in figures.schedule.batches for batch in batches]
    assert figure(planned(name, *flags), r"tokens forwarded in training: ([\d,]+)") == sum(forwarded)


def test_processes_are_planned_as_they_are_dealt(plan: Callable[..., Plan], tmp_path: Path):
    file = tiny.save_pairs(tmp_path / "uneven.jsonl", tiny.uneven_rows(32))
    data = ["--dataset_name", str(file), "--num_train_epochs", "2"]
    two = dataclasses.replace(ALONE, processes=2)
    even = plan(DPOOptionSet, *data, hardware=two)
    order = Order(32, 42, Dealing(2, 1, 4), even.schedule.costs)
    of_steps = [[pair for batch in step for pair in batch] for step in even.schedule.batches]
    assert of_steps == [step for epoch in range(2) for step in order.epoch(epoch)]
    assert (
        1
        <= even.schedule.unevenness(even.schedule.batches)
        < 1.1
        < even.schedule.unevenness(even.schedule.dealt(False))
    )
    line = r"slowest process, over the mean: 1.0\d, in the sampler's order 1.[1-9]\d"
    assert re.fullmatch(line, even.schedule.unevenness_line())
    coupled = plan(DPOOptionSet, *data, "--loss_type", "aot", hardware=two)
    assert coupled.schedule.batches == even.schedule.dealt(False)
    assert "not dealt evenly: aot may depend" in coupled.schedule.unevenness_line()
    forced = plan(DPOOptionSet, *data, "--loss_type", "aot", "--balance_ranks", "true", hardware=two)
    assert forced.schedule.batches == even.schedule.batches


def test_the_reference_pass_comes_before_gradients(plan: Callable[..., Plan], tiny_model: Path, tmp_path: Path):
    """Two wide models take more than one with an adapter's gradients; no weights are there to be read."""
    wide = tmp_path / "wide"
    shutil.copytree(tiny_model, wide, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"hidden_size": 512, "intermediate_size": 512}))
    flags = ("--model_name_or_path", str(wide), "--use_peft", "true", "--lora_r", "1")
    flags += ("--per_device_train_batch_size", "1", "--max_length", "20")
    alone = plan(DPOOptionSet, *flags).peak
    assert (alone.reference, alone.optimizer > 0) == (0, True)
    peak = plan(DPOOptionSet, *flags, "--reference_model", "elsewhere").peak
    assert (peak.reference, peak.gradients, peak.optimizer) == (peak.weights, 0, 0)
    assert peak.weights == alone.weights


@pytest.mark.parametrize("given", [(), ("--use_peft", "true", "--lora_r", "2")])
def test_a_reference_that_follows_holds_what_is_trained_once_more(plan: Callable[..., Plan], given: tuple[str, ...]):
    alone = plan(DPOOptionSet, *given)
    synced = plan(DPOOptionSet, *given, "--sync_ref_model", "true", "--ref_model_sync_steps", "1")
    trained = sum(each.numel() * 4 for each in alone.model.parameters() if each.requires_grad)
    assert (alone.peak.reference, synced.peak.reference) == (0, trained)
    assert synced.peak.total == alone.peak.total + trained
    assert "of training" in synced.time_line()


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({}, {"weights": 800, "gradients": 800, "optimizer": 1600}),
        # Gradients once more, in DDP's buckets
        ({"copies_gradients": True}, {"weights": 800, "gradients": 1600, "optimizer": 1600}),
        ({"sharded": frozenset(["gradients", "optimizer"])}, {"weights": 800, "gradients": 100, "optimizer": 200}),
        (
            {"sharded": frozenset(["weights", "gradients", "optimizer"])},
            {"weights": 100, "gradients": 100, "optimizer": 200},
        ),
    ],
)
def test_what_is_cut_over_eight_devices(plan: Callable[..., Plan], hardware: Any, expected: dict[str, int]):
    eight = dataclasses.replace(ALONE, device="cuda", processes=8, **hardware)
    usage = Usage(weights=800, gradients=800, optimizer=1600, activations=5000)
    made = plan(DPOOptionSet, hardware=eight)
    peak = made.on_device(usage)
    # Of sharded weights two layers are whole at a time
    layers = 2 * 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) if "weights" in eight.sharded else 0
    assert dataclasses.asdict(peak) == expected | {
        "reference": 0,
        "activations": 5000 + layers,
        "kernels": kernels(made),
        "allocator": 250,
        "libraries": 0,
    }


def test_four_bits_are_saved_in_the_linear_layers(plan: Callable[..., Plan]):
    linear = 2 * sum(inputs * outputs for inputs, outputs in ADAPTED)
    figures = plan(DPOOptionSet, "--use_peft", "true", "--load_in_4bit", "true")
    # 4 bits, and 32 / 64 bits in 8-bit constants with their own of 32 / 256: 0.127 bits a weight
    assert figures.saved_by_4_bits == pytest.approx(linear * (4 - 4.127 / 8), abs=1)
    assert figures.on_device(Usage(weights=10**6)).weights == 10**6 - figures.saved_by_4_bits
    # Each of eight processes has all of them, and an eighth of the others
    eight = dataclasses.replace(
        figures, hardware=dataclasses.replace(ALONE, processes=8, sharded=frozenset(["weights"]))
    )
    others = 10**6 - linear * 4
    assert eight.on_device(Usage(weights=10**6)).weights == pytest.approx(linear * 4.127 / 8 + others / 8, abs=1)
    assert figures.seconds() is None


def test_what_does_not_fit_gets_the_cheapest_change(planned: Planned):
    text = planned("dpo", "--device_memory_gib", "0.001")
    assert "WILL NOT FIT: 0.0 GiB are there; smaller batches, gradient checkpointing and LoRA are not enough" in text


def test_the_cheapest_change_is_the_first_that_fits(plan: Callable[..., Plan]):
    figures = plan(DPOOptionSet, "--layout", "padded")
    shared = figures.changed({"layout": "shared"})
    assert shared.peak.total < figures.peak.total
    assert figures.remedy(shared.peak.total).startswith("the cheapest change that fits is --layout shared (")
    half = shared.changed({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert half.peak.total < shared.peak.total
    flags = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    assert shared.remedy(half.peak.total).startswith(f"the cheapest change that fits is {flags} (")
    assert figures.remedy(half.peak.total).startswith(f"the cheapest change that fits is --layout shared {flags} (")


def test_checkpoints_leave_the_heap_its_holes(plan: Callable[..., Plan]):
    """On the CPU: the allocator's part is 0.27 of what would be kept without them; on a GPU a twentieth of what is."""
    without, with_them = (plan(DPOOptionSet, "--gradient_checkpointing", value).peak for value in ("false", "true"))
    assert without.allocator == pytest.approx(0.27 * without.activations, abs=1)
    assert with_them.allocator == without.allocator
    assert with_them.activations < without.activations
    on_gpu = plan(DPOOptionSet, hardware=dataclasses.replace(ALONE, device="cuda")).peak
    assert on_gpu.allocator == pytest.approx(0.05 * on_gpu.activations, abs=1)


def test_ways_out_by_what_they_cost(plan: Callable[..., Plan]):
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12}
    checkpoints, peft = {"gradient_checkpointing": True}, {"use_peft": True}
    accumulate = ("--gradient_accumulation_steps", "3")
    assert list(plan(SFTOptionSet, *accumulate).ways_out()) == [
        two,
        one,
        checkpoints,
        one | checkpoints,
        peft,
        one | checkpoints | peft,
    ]
    layout = {"layout": "shared"}
    with_all = ("--use_peft", "true", "--gradient_checkpointing", "true", "--layout", "packed")
    assert list(plan(DPOOptionSet, *accumulate, *with_all).ways_out()) == [layout, two, layout | two, one, layout | one]
    # A global batch size stays what it is
    batch = {"per_device_train_batch_size": 2}
    assert next(plan(DPOOptionSet, "--global_batch_size", "12").ways_out()) == batch
    assert plan(DPOOptionSet, "--global_batch_size", "12").changed(batch).schedule.accumulation == 6


def test_debug_is_four_steps(plan: Callable[..., Plan]):
    figures = plan(DPOOptionSet, "--debug", "true")
    assert figures.schedule.steps == len(figures.schedule.batches) == 4


def test_an_odd_batch_is_not_halved(plan: Callable[..., Plan]):
    way = next(plan(DPOOptionSet, "--per_device_train_batch_size", "3").ways_out())
    assert way == {"gradient_checkpointing": True}


def test_what_no_plan_counts_is_refused(arguments: list[str]):
    run = DPOOptionSet(*parse([*arguments, "--tp_size", "2"], classes(DPOOptionSet), prog="plan"))
    with pytest.raises(UserError, match="--plan does not count --tp_size"):
        plan_run(run, PlanOptions(plan=True))


def test_the_probe_reckons_with_all_layers(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch):
    """Steps of 10 + 2 s a layer, and forwards of 5 + 1 s: two layers take 14 and 7."""
    figures = plan(DPOOptionSet)

    def timed(rehearsal: Any, *_: Any) -> tuple[float, float]:
        layers = rehearsal.model.config.num_hidden_layers
        return 10.0 + 2 * layers, 5.0 + layers

    monkeypatch.setattr("tandem.training.rehearsal.Rehearsal.time", timed)
    assert figures.seconds() == (14.0, 7.0)
    # Eight micro-batches, of training and of the reference
    assert figures.time_line() == "time: 112 s of training, 56 s of the reference where not cached"
    monkeypatch.setattr("tandem.training.plan.PROBED_LAYERS", (1, 1))
    assert figures.seconds() == (12.0, 6.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", {"device": "cpu", "processes": 1, "sharded": frozenset(), "copies_gradients": False}),
        ("ddp", {"processes": 8, "sharded": frozenset(), "copies_gradients": True}),
        ("fsdp", {"processes": 8, "sharded": frozenset(("weights", "gradients", "optimizer"))}),
    ],
)
def test_hardware_of_accelerate_configs(name: str, expected: dict[str, Any]):
    config = str(ROOT / "accelerate_configs" / f"{name}.yaml")
    hardware = read_hardware(PlanOptions(plan=True, accelerate_config=config, device_memory_gib=80.0), use_cpu=False)
    assert hardware.limit == 80 * GIB
    assert {field: getattr(hardware, field) for field in expected} == expected


def test_an_accelerate_config_that_is_none(tmp_path: Path):
    for text in ("- a", "a: b", "{"):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(UserError, match=r"--accelerate_config .*a\.yaml: "):
            read_hardware(PlanOptions(plan=True, accelerate_config=str(tmp_path / "a.yaml")), use_cpu=True)
