"""Every causal language model that the installed transformers knows: its plan, and the run that it is the plan of.

The plan and two steps of DPO, on all weights and on a LoRA adapter by the defaults. No traceback anywhere, and the run
takes the layout that was planned.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tandem.errors import UserError
from tests import families, tiny

# Two that have failed in other ways: a base model that is the whole model, no layer of attention
FAST = ("llama4_text", "mamba2")
TURNS = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pairs(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.hh_rows(8))


@pytest.fixture
def walk(
    pairs: Path, tmp_path: Path, script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, str]]:
    """`walk("llama", "--use_peft", "true")`: the layout of the plan and that of the run, or the one line of each."""

    def go(name: str, *flags: str) -> dict[str, str]:
        model, out = tmp_path / "model", tmp_path / "out"
        if not model.exists():
            families.save(name, model)
        common = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir", str(out), *flags]
        common += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
        run = ["--max_steps", "2", "--save_strategy", "no", "--ref_cache", str(tmp_path / "cache")]
        found = {}
        for stage, more in (("plan", ["--plan"]), ("run", run)):
            try:
                script("dpo").main([*common, *more])
                said = capsys.readouterr().out if stage == "plan" else (out / "train.log").read_text()
                found[stage] = re.findall(r"layout (shared|packed|padded)", said)[0]
            except UserError as error:
                found[stage] = f"refused: {error}"
        shutil.rmtree(out, ignore_errors=True)
        return found

    return go


@pytest.mark.parametrize("name", FAST)
def test_a_few_families(name: str, walk: Callable[..., dict[str, str]]):
    flags = () if name == "llama4_text" else ("--use_peft", "true")
    assert walk(name, *flags) == {"plan": "padded", "run": "padded"}


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(TURNS))
def test_all_families(
    turn: int, walk: Callable[..., dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    faults = []
    for name in families.names()[turn::TURNS]:
        if name in families.NOT_TINY:
            continue
        for flags in ((), ("--use_peft", "true")):
            try:
                found = walk(name, *flags)
            except Exception as error:
                faults.append(f"{name} {flags}: {type(error).__name__}: {error}")
                continue
            if found["plan"] != found["run"] and not found["run"].startswith("refused: "):
                faults.append(f"{name} {flags}: {found}")
        shutil.rmtree(tmp_path / "model")
    assert not faults, "\n".join(faults)


def test_what_is_not_tried_is_known():
    assert set(families.NOT_TINY) <= set(families.names())
