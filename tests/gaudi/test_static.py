"""One shape for training and one for the reference, whatever the pairs; and no look at a value while a step runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.gaudi import steps
from tests.gaudi.steps import Case


def shapes_of(trainer: Any) -> list[tuple[int, ...]]:
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    seen: list[tuple[int, ...]] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    base.model.register_forward_pre_hook(note, with_kwargs=True)  # PEFT calls the outer forward past its hooks
    return seen


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> str:
    """19 pairs of many lengths, no multiple of a batch."""
    rows = tiny.hh_rows(19)
    for index, row in enumerate(rows):
        row["chosen"] += " and again" * (index % 5)
        row["rejected"] += " never" * (index % 7)
    return str(tiny.save_pairs(tmp_path_factory.mktemp("uneven") / "train.jsonl", rows))


@pytest.mark.parametrize("use_peft", [False, True])
def test_one_shape(tiny_model: Path, uneven: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_peft: bool):
    from tandem.training.trainers.reference_scorer import ReferenceScorer

    reference: list[tuple[int, ...]] = []
    scored = ReferenceScorer.logps

    def counted(self: Any, model: Any, inputs: Any) -> Any:
        reference.append(tuple(inputs["input_ids"].shape))
        return scored(self, model, inputs)

    monkeypatch.setattr(ReferenceScorer, "logps", counted)
    case = Case(str(tiny_model), uneven, str(tmp_path), use_peft=use_peft, extra={"max_steps": -1})
    trainer = steps.build("gaudi", case)
    seen = shapes_of(trainer)
    trainer.train()
    assert (len(seen), len(reference)) == (6, 5)  # the first batch is first compared with its reference
    assert set(seen) == set(reference) == {(8, 96)}


def test_one_shape_in_sft(tiny_model: Path, uneven: str, tmp_path: Path):
    case = Case(str(tiny_model), uneven, str(tmp_path), "sft", extra={"max_steps": -1})
    trainer = steps.build("gaudi", case)
    seen = shapes_of(trainer)
    trainer.train()
    assert len(seen) == 5
    assert set(seen) == {(4, 96)}


class NoLook(TorchDispatchMode):
    """Fails on what waits for the device or makes a shape depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            raise AssertionError(f"{name} in the middle of a step")
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], list | tuple) else ()
        if any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices):
            raise AssertionError("boolean indexing in the middle of a step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("look", [lambda x: x[0].item(), lambda x: x[x > 0], lambda x: bool(x[0] > 0), torch.nonzero])
def test_the_guard_sees(look: Any):
    with pytest.raises(AssertionError, match="in the middle"), NoLook():
        look(torch.ones(3))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sft"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_no_look_at_a_value_in_a_step(
    tiny_model: Path, uneven: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, use_peft: bool
):
    """From the batch to the gradient, clipped, and the optimizer's step; the monitor then reads once."""
    case = Case(str(tiny_model), uneven, str(tmp_path), loss, use_peft, accumulation=2)
    trainer = steps.build("gaudi", case)
    if trainer.reference is not None:  # it looks at a value, once a run, before the first step
        trainer.reference.check_once = lambda *_: None
    guarded = 0
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

    def training_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal guarded
        guarded += 1
        with NoLook():
            return step(*args, **kwargs)

    def clipped(*args: Any, **kwargs: Any) -> Any:
        with NoLook():
            return clip(*args, **kwargs)

    optimizer_step = torch.optim.SGD.step

    def stepped(*args: Any, **kwargs: Any) -> Any:
        with NoLook():
            return optimizer_step(*args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", clipped)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    trainer.train()
    assert guarded == 9  # micro-batches: an epoch has 5, in 3 steps
