"""The engine against stock TRL: same losses, gradients, metrics and weights, in float32 on the CPU."""

import copy
import math

import pytest
import torch
from peft import LoraConfig

from tandem.engine.forward import add_pair_forward
from tests.engine.tiny_models import collate, perturbed, random_pairs, tiny_model

SERVED = [
    "Llama",
    "Gemma2",
    "Gemma3",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "SmolLM3",
    "Olmo2",
    "GPT2",
    "GPTNeoX",
    "Phi",
    "Phi3",
    "Granite",
    "Mixtral",
    "Qwen2Moe",
    "GptOss",
    "OPT",
]
LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]
# What differs between two runs of the same trainer
TIMINGS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if name not in TIMINGS:
            assert abs(ours[name] - expected) <= tolerance * max(1.0, abs(expected)), name


def one_step(trainer, batch):
    """Loss, gradient norm and every metric of one micro-batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return metrics | {"loss": loss.item(), "gradient norm": norm.item()}


def train(trainer):
    """Every log of a training run."""
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def policy():
    return perturbed(tiny_model("Llama"))


def trainers(build_trainer, model, reference, **settings):
    """A trainer of each kind over copies of the same models."""
    return [
        build_trainer(copy.deepcopy(model), copy.deepcopy(reference), engine=engine, **settings)
        for engine in ("shared", None)
    ]


@pytest.mark.parametrize("use_weighting", [False, True])
def test_every_loss_and_divergence(build_trainer, policy, use_weighting):
    ours, theirs = trainers(
        build_trainer, policy, tiny_model("Llama"), use_weighting=use_weighting, label_smoothing=0.1, ld_alpha=0.5
    )
    batch = next(iter(theirs.get_train_dataloader()))
    # TRL refuses to weight aot, and fails on hinge and sft, which it weights in place
    losses = [loss for loss in LOSSES if not (use_weighting and loss in ("aot", "aot_unpaired", "hinge", "sft"))]
    divergent = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
    settings = [(loss, "reverse_kl") for loss in losses]
    settings += [(loss, divergence) for loss in losses if loss in divergent for divergence in DIVERGENCES]
    seen = set()
    for loss, divergence in settings:
        results = []
        for trainer in (ours, theirs):
            trainer.loss_types, trainer.f_divergence_type = [loss], divergence
            trainer.f_alpha_divergence_coef = 0.5
            results.append(one_step(trainer, batch))
        seen.add(round(results[1]["loss"], 6))
        assert_same(*results)
    assert len(seen) > len(settings) * 0.8, "the settings are different losses"
    assert [report.layout for report in ours.reports] == ["shared", "shared"]


@pytest.mark.parametrize("name", SERVED)
def test_every_architecture(build_trainer, name):
    reference = tiny_model(name)
    ours, theirs = trainers(build_trainer, perturbed(tiny_model(name)), reference)
    assert_same(one_step(ours, batch := next(iter(theirs.get_train_dataloader()))), one_step(theirs, batch))
    assert {report.layout for report in ours.reports} == {"shared"}


@pytest.mark.parametrize("name", ["Bloom", "FalconH1"])
def test_an_architecture_that_cannot_be_served_is_trained_padded(build_trainer, name):
    ours, theirs = trainers(build_trainer, perturbed(tiny_model(name)), tiny_model(name))
    assert_same(one_step(ours, batch := next(iter(theirs.get_train_dataloader()))), one_step(theirs, batch))
    assert {report.layout for report in ours.reports} == {"padded"}


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Mixtral"])
def test_training_logs(build_trainer, name, lora, checkpointing):
    model = perturbed(tiny_model(name))
    settings = {
        "gradient_checkpointing": bool(checkpointing),
        "gradient_checkpointing_kwargs": checkpointing or None,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        # Adam divides a rounding error in a gradient near zero by that gradient
        "optim": "sgd",
        "learning_rate": 1e-2,
    }
    if lora:
        settings["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    reference = None if lora else tiny_model(name)
    logs = []
    for trainer in trainers(build_trainer, model, reference, **settings):
        torch.manual_seed(0)
        if lora:
            perturbed(trainer.model)
        logs.append(train(trainer))
    assert len(logs[0]) == len(logs[1]) == 5
    for ours, theirs in zip(*logs, strict=True):
        assert "grad_norm" in theirs or "train_loss" in theirs
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_weights_after_twenty_steps(build_trainer, name):
    model = perturbed(tiny_model(name))
    ours, theirs = trainers(
        build_trainer, model, tiny_model(name), max_steps=20, per_device_train_batch_size=2, pairs=random_pairs(12)
    )
    ours.train()
    theirs.train()
    before = dict(model.named_parameters())
    weights = dict(ours.model.named_parameters())
    for tensor, expected in theirs.model.named_parameters():
        assert (expected - before[tensor]).norm() > 1e-3 * before[tensor].norm()
        assert (weights[tensor] - expected).norm() <= 1e-4 * expected.norm()


def test_layouts_agree(build_trainer, policy):
    results = {}
    for layout in ("shared", "packed", "padded"):
        trainer = build_trainer(copy.deepcopy(policy), tiny_model("Llama"), engine=layout)
        results[layout] = one_step(trainer, next(iter(trainer.get_train_dataloader())))
        assert {report.layout for report in trainer.reports} == {layout}
    assert_same(results["shared"], results["padded"])
    assert_same(results["packed"], results["padded"])


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_starts_at_ln_2_and_learns(build_trainer, lora):
    model = tiny_model("Llama")
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = build_trainer(
        model, None if lora else copy.deepcopy(model), bf16=True, peft_config=peft_config,
        learning_rate=1e-2, num_train_epochs=4,
    )  # fmt: skip
    losses = [log["loss"] for log in train(trainer)[:-1]]
    assert abs(losses[0] - math.log(2)) < 1e-4
    assert losses[-1] < 0.6


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_half_log_probs_are_as_close_to_float32_as_trls(dtype: torch.dtype, coarse: float):
    """Root mean square over about 2,000 tokens; the two differ by a percent from draw to draw, either way."""
    model, batch = tiny_model("Llama"), collate(random_pairs(100))

    def log_probs(layout: str, half: bool) -> torch.Tensor:
        forward = copy.deepcopy(model)
        add_pair_forward(forward, layout=layout)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=half):
            output = forward(**batch, use_cache=False, fused_lm_head=True)
        assert output.log_probs.dtype == torch.float32
        return output.log_probs[batch["labels"][:, 1:] != -100]

    exact = log_probs("padded", half=False)
    trl, ours = ((log_probs(layout, half=True) - exact).square().mean().sqrt() for layout in ("padded", "shared"))
    assert exact.numel() > 1500
    assert trl > coarse, "autocast was on"
    assert ours <= 1.02 * trl


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_fp16_gradients_bear_the_loss_scaler(layout: str):
    """What a T4 computes: float16 autocast, and a mean over tokens times the 2**16 that GradScaler begins with."""
    model, batch = tiny_model("Llama"), collate(random_pairs(20))
    real = batch["labels"][:, 1:] != -100

    def gradient(half: bool) -> torch.Tensor:
        forward = copy.deepcopy(model)
        add_pair_forward(forward, layout=layout)
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            loss = -forward(**batch, use_cache=False, fused_lm_head=True).log_probs[real].mean()
        (loss * 2**16).backward()
        return torch.cat([parameter.grad.flatten() for parameter in forward.parameters()]) / 2**16

    exact, found = gradient(half=False), gradient(half=True)
    assert 1e-5 < (found - exact).norm() / exact.norm() < 1e-2
