import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tandem.engine.layout import Layout
from tandem.options.model import LoraOptions, ModelOptions
from tandem.options.training import TrainOptions
from tandem.training.foreseen import build
from tandem.training.rehearsal import Batch, Rehearsal, Storages, optimizer_of, random_like, replace_tensors

# Two pairs: chosen rows, then rejected, of 9, 5, 7 and 4 tokens after prompts of 3 and 2
ROWS = [
    ([5, 6, 7, 20, 21, 22, 23, 24, 25], 3),
    ([5, 8, 30, 31, 32], 2),
    ([5, 6, 7, 40, 41, 42, 43], 3),
    ([5, 8, 50, 51], 2),
]
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def rehearse(model: Path, *, checkpoints: bool = False, peft: bool = False, optim: str = "adamw_torch") -> Rehearsal:
    lora = LoraOptions(use_peft=True, lora_r=4) if peft else LoraOptions()
    train = TrainOptions("out", bf16=False, optim=optim)
    return Rehearsal(
        build(ModelOptions(str(model)), lora, checkpoints=checkpoints), train, autocast=None, dropout=False
    )


def parameters(model: nn.Module) -> tuple[int, int, int]:
    """Numbers in all parameters, in those that are trained, and how many of the latter there are."""
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() for parameter in model.parameters()), sum(trained), len(trained)


def test_storages_are_counted_while_they_live():
    model = nn.Linear(10, 10, bias=False)
    storages = Storages(model)
    with storages:
        kept = torch.ones(1000)
        double = kept * 2
        view = double[10:]
        assert storages.live == {"weights": 400, "activations": 8000}
        del double
        assert storages.live["activations"] == 8000  # the view holds it
        del view
        assert storages.live["activations"] == 4000
        storages.mark([kept], "gradients")
        assert storages.live == {"weights": 400, "activations": 0, "gradients": 4000}
    assert storages.at_peak == {"weights": 400, "activations": 8000}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_forward_keeps_is_what_torch_saves(tiny_model: Path, layout: Layout):
    """Two counts of a forward's activations: storages that live after it, and tensors that real autograd saves."""
    batch = Batch.of(ROWS, layout)
    rehearsal = rehearse(tiny_model)
    with rehearsal._counted(batch) as (step, fake_batch, storages):
        loss = step.loss(fake_batch)
        alive = storages.live["activations"]
        del loss
        assert storages.live["activations"] < alive / 20  # all of it hangs on the loss

    replace_tensors(rehearsal.model, functools.partial(random_like, device=torch.device("cpu")))
    known = {tensor.untyped_storage().data_ptr() for tensor in rehearsal.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert batch.log_probs(rehearsal.model).requires_grad
    assert sum(saved.values()) == pytest.approx(alive, rel=0.02)


@pytest.mark.parametrize(("peft", "layout"), [(False, "shared"), (False, "padded"), (True, "shared"), (True, "padded")])
def test_parts_of_a_step(tiny_model: Path, peft: bool, layout: Layout):
    rehearsal = rehearse(tiny_model, peft=peft)
    everything, trained, tensors = parameters(rehearsal.model)
    batch = Batch.of(ROWS, layout)
    first = rehearsal.count_step(batch, micro_batches=1, has_state=False)
    assert first["weights"] == 4 * everything
    later = rehearsal.count_step(batch, micro_batches=2, has_state=True)
    # AdamW: two moments of each trained number, and a step count of each tensor
    assert later["optimizer"] == 4 * (2 * trained + tensors)
    # In the second backward the gradients of the first are all there
    assert later["gradients"] == 4 * trained
    assert later.total() > first.total()


def test_the_first_step_has_no_state_while_it_needs_its_activations(tiny_model: Path):
    rehearsal = rehearse(tiny_model, peft=True)
    usage = rehearsal.count_step(Batch.of(ROWS, "shared"), micro_batches=1, has_state=False)
    assert usage["optimizer"] == 0
    assert usage["activations"] > 0


def test_optimizers_without_moments(tiny_model: Path):
    rehearsal = rehearse(tiny_model, optim="sgd")
    assert rehearsal.count_step(Batch.of(ROWS, "shared"), micro_batches=1, has_state=True)["optimizer"] == 0
    rehearsal = rehearse(tiny_model, optim="adafactor")
    tensors = list(rehearsal.model.parameters())
    # A row and a column of a matrix, all of a vector
    factored = 4 * sum(sum(tensor.shape) if tensor.dim() == 2 else tensor.numel() for tensor in tensors)
    usage = rehearsal.count_step(Batch.of(ROWS, "shared"), micro_batches=1, has_state=True)
    # And a number for each tensor, made anew in the step
    assert 0 <= usage["optimizer"] - factored <= 4 * len(tensors)


def test_moments_of_eight_bits():
    """Figures of bitsandbytes 0.50.2: a byte a moment and a float a block of 256, but all floats in what is small, and
    transformers leaves embeddings out."""
    small, large = nn.Linear(273, 15, bias=False), nn.Linear(64, 64, bias=False)
    model = nn.ModuleList([nn.Embedding(100, 50), nn.Linear(50, 100), small, large])
    train = TrainOptions("out", bf16=False)
    train.optim = "adamw_8bit"  # which the constructor refuses where bitsandbytes is not installed
    optimizer = optimizer_of(train, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    kept = [sum(tensor.nbytes for tensor in optimizer.state[own].values()) for own in model.parameters()]
    embedding, weight, bias = 8 * 5000, 2 * (5000 + 4 * 20), 8 * 100
    assert kept == [embedding, weight, bias, 8 * 4095, 2 * (4096 + 4 * 16)]


def test_gradient_checkpoints_take_less(tiny_model: Path):
    batch = Batch.of([(list(range(5, 205)), 50)] * 4, "packed")
    everything = rehearse(tiny_model).count_step(batch, micro_batches=1, has_state=False)
    checkpoints = rehearse(tiny_model, checkpoints=True).count_step(batch, micro_batches=1, has_state=False)
    assert checkpoints["activations"] < 0.7 * everything["activations"]


def test_a_forward_without_gradient_keeps_one_layer(tiny_model: Path):
    batch = Batch.of([(list(range(5, 205)), 50)] * 4, "packed")
    rehearsal = rehearse(tiny_model)
    usage = rehearsal.count_forward(batch)
    assert usage["weights"] == 4 * parameters(rehearsal.model)[0]
    assert 0 < usage["activations"] < rehearsal.count_step(batch, micro_batches=1, has_state=False)["activations"] / 2


def test_a_model_of_fewer_layers(tiny_model: Path):
    options = ModelOptions(str(tiny_model))
    whole, half = (build(options, LoraOptions(), checkpoints=False, layers=layers) for layers in (2, 1))
    # q, k, v, o, three of the MLP and two norms
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32
    assert parameters(whole)[0] - parameters(half)[0] == layer


def test_a_step_is_timed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """The fastest of two steps, and of two forwards, by a clock of the test's own: this machine has other work."""
    readings = iter([0.0, 5.0, 10.0, 13.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr("tandem.training.rehearsal.time", SimpleNamespace(perf_counter=lambda: next(readings)))
    times = rehearse(tiny_model).time(Batch.of(ROWS, "shared"), torch.device("cpu"), repeats=2)
    assert times == (3.0, 1.0) and next(readings, None) is None
