import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from tandem.errors import UserError
from tandem.monitor.memory import GIB
from tandem.options import PlanOptions
from tandem.plan import _Storages, read_hardware

ROOT = Path(__file__).parents[1]
Planned = Callable[..., str]


@pytest.fixture
def planned(
    script: Callable[[str], ModuleType], tiny_model: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> Planned:
    """`planned("--beta", "1", …)`: what `dpo.py --plan` prints about 32 pairs."""

    def run(*argv: str) -> str:
        files = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tiny_data), "--output_dir", "none"]
        fast = ["--bf16", "false", "--gradient_checkpointing", "false", "--per_device_train_batch_size", "4"]
        script("dpo").main(["--plan", *files, *fast, *argv])
        return capsys.readouterr().out

    return run


def part(text: str, name: str) -> float:
    found = re.search(rf"^  {name}: ([0-9.]+) GiB$", text, re.MULTILINE)
    assert found
    return float(found[1])


def test_a_plan_of_the_tiny_model(planned: Planned, tiny_model: Path):
    text = planned("--num_train_epochs", "2", "--gradient_accumulation_steps", "3")
    # A Llama with tied embeddings: vocabulary x 32, two layers, two norms each, and the last norm
    vocabulary = yaml.safe_load((tiny_model / "config.json").read_text())["vocab_size"]
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    count = vocabulary * 32 + 2 * layer + 32
    assert f"parameters: {count:,}; trained: {count:,} (100.00%)" in text
    # 8 micro-batches of 4 pairs make 3 steps of up to 3, twice
    assert "steps: 6 of 4 x 3 x 1 pairs" in text
    assert "fits: " in text
    assert re.search(r"time: \d+ s of training, \d+ s of the reference", text)
    assert not Path("none").exists()


def test_lora_trains_a_share(planned: Planned):
    text = planned("--use_peft", "true", "--lora_r", "4")
    trained = re.search(r"trained: ([\d,]+) ", text)
    assert trained
    # Rank 4 on q, k, v, o, gate, up and down of two layers: r x (in + out) each
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert int(trained[1].replace(",", "")) == 2 * sum(4 * (inputs + outputs) for inputs, outputs in shapes)


def test_the_padded_layout_is_refused(planned: Planned):
    with pytest.raises(UserError, match="--plan counts the layouts shared and packed"):
        planned("--layout", "padded")


def test_what_does_not_fit_gets_the_cheapest_change(planned: Planned):
    text = planned("--device_memory_gib", "0.001")
    assert "WILL NOT FIT: 0.0 GiB are there; smaller batches, gradient checkpointing and LoRA are not enough" in text


def test_the_cheapest_change_is_the_first_that_fits(monkeypatch: pytest.MonkeyPatch):
    from tandem.plan import _Run

    @dataclasses.dataclass
    class Total:
        total: int

    class Sized:
        def __init__(self, total: int) -> None:
            self.total = total

        def peak(self) -> Total:
            return Total(self.total)

    changes = [("--a", Sized(3 * GIB)), ("--b", Sized(2 * GIB)), ("--c", Sized(GIB))]
    monkeypatch.setattr(_Run, "candidates", lambda self: iter(changes))
    assert _Run.remedy(_Run.__new__(_Run), 2 * GIB) == "the cheapest change that fits is --b (2.00 GiB)"


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


def test_storages_are_counted_while_they_live():
    storages = _Storages()
    with storages:
        kept = torch.ones(1000)
        double = kept * 2
        view = double[10:]
        assert storages.live == 8000
        del double
        assert storages.live == 8000  # the view holds it
        del view
        assert storages.live == 4000
    assert storages.peak == 8000
