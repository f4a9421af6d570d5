import contextlib
import copy
import logging

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.testing import assert_close
from trl.trainer import dpo_trainer
from trl.trainer.utils import add_fused_lm_head

from tandem.engine import forward, probe
from tandem.engine.choice import Findings
from tandem.engine.forward import add_pair_forward, pair_engine
from tandem.engine.logprobs import score_tokens
from tandem.engine.precision import tolerance
from tests.engine.tiny_models import collate, perturbed, random_pairs, tiny_model

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No memory of other tests: what was measured before is in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where the probe's memory is by default


@pytest.fixture
def batch():
    return collate(random_pairs(3, seed=5))


@contextlib.contextmanager
def backbone_calls(model):
    """The number of tokens of every call of the backbone's first layer."""
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    with layer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[:2].numel())):
        yield calls


def both(name, temperature=1.0, cast_lm_head_to_fp32=False, **changes):
    """The same model with the pair forward and with TRL's, all fields asked for."""
    ours, theirs = tiny_model(name, **changes), tiny_model(name, **changes)
    arguments = (temperature, cast_lm_head_to_fp32, FIELDS)
    add_pair_forward(ours, *arguments)
    add_fused_lm_head(theirs, *arguments)
    return ours, theirs


def assert_same_output(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": False}),
        ("GPT2", {}),
        ("Phi", {}),  # its head has a bias
        ("Gemma2", {"final_logit_softcapping": 2.0}),
        ("Granite", {}),
        ("Mixtral", {"output_router_logits": True}),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_every_field_is_trls(name, changes, side):
    batch = collate(random_pairs(3, seed=5), side)
    outputs = [model(**batch, fused_lm_head=True) for model in both(name, temperature=0.8, **changes)]
    assert_same_output(*outputs)
    assert (outputs[0].aux_loss is not None) == (name == "Mixtral")


def test_a_head_in_float32_runs_outside_autocast(batch, monkeypatch):
    seen = []

    def score(hidden, *arguments):
        seen.append((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return score_tokens(hidden, *arguments)

    monkeypatch.setattr(forward, "score_tokens", score)
    ours, theirs = both("Qwen2", cast_lm_head_to_fp32=True)
    assert_same_output(*(model(**batch, fused_lm_head=True) for model in (ours, theirs)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours.bfloat16()(**batch, fused_lm_head=True)
    assert seen[-1] == (torch.float32, False)


def test_the_loss_is_averaged_as_trl_does(batch):
    for items in (None, 7):
        ours, theirs = (m(**batch, num_items_in_batch=items, fused_lm_head=True).loss for m in both("Llama"))
        assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_one_backbone_call_over_each_distinct_token(batch, layout):
    model = tiny_model("Llama")
    add_pair_forward(model, layout=layout)
    model(**batch, fused_lm_head=True)  # the first call probes
    pairs = random_pairs(3, seed=5)
    p, c, r = (sum(len(pair[part]) for pair in pairs) for part in ("prompt_ids", "chosen_ids", "rejected_ids"))
    with backbone_calls(model) as calls:
        model(**batch, fused_lm_head=True)
    assert calls == [p + c + r if layout == "shared" else 2 * p + c + r]


def test_lengths_do_not_change_the_number_of_calls():
    model = tiny_model("Llama")
    add_pair_forward(model)
    model(**collate(random_pairs(1)), fused_lm_head=True)
    empty = [{"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}]
    cut = [{"prompt_ids": [5, 6], "chosen_ids": [], "rejected_ids": []}]
    equal = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [6, 7]}]
    for pairs in (empty, cut, equal, empty + cut + equal, random_pairs(5)):
        with backbone_calls(model) as calls:
            output = model(**collate(pairs), fused_lm_head=True)
        assert len(calls) == 1
        output.log_probs.sum().backward()


def test_other_calls_and_generation_are_the_models_own(batch):
    ours, plain = tiny_model("Mistral"), tiny_model("Mistral")
    add_pair_forward(ours)
    ours(**batch, fused_lm_head=True)
    ids = batch["input_ids"][:1, :5]
    assert torch.equal(ours(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


def test_a_forward_between_forward_and_backward_does_not_disturb_checkpointing(batch):
    gradients = []
    for disturb in (False, True):
        model = tiny_model("Llama").train()
        add_pair_forward(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch, fused_lm_head=True).log_probs.sum()
        if disturb:
            with torch.no_grad():
                model.generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
                model(**collate(random_pairs(2, seed=9)), fused_lm_head=True)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


def test_a_disabled_adapter_gives_the_reference(batch):
    model = tiny_model("Llama")
    reference = tiny_model("Llama")
    add_fused_lm_head(reference)
    add_pair_forward(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted = model(**batch, fused_lm_head=True).log_probs
    with torch.no_grad(), model.disable_adapter():
        disabled = model(**batch, fused_lm_head=True).log_probs
    expected = reference(**batch, fused_lm_head=True).log_probs
    assert_close(disabled, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, expected, atol=1e-3)


def test_prompt_learning_takes_the_padded_forward(batch, caplog):
    models = []
    for install in (add_pair_forward, add_fused_lm_head):
        model = tiny_model("Llama")
        install(model)
        torch.manual_seed(0)
        models.append(get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")))
    ours, theirs = (model(**batch, fused_lm_head=True).log_probs for model in models)
    assert torch.equal(ours, theirs)
    assert "padded forward, because" in caplog.text


def unserved_batches(batch):
    odd = {name: tensor[:3] for name, tensor in batch.items()}
    hole = batch | {"attention_mask": batch["attention_mask"].clone()}
    hole["attention_mask"][0, 1] = 0
    positions = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return {
        "even number of rows": odd,
        "hole": hole,
        "position_ids": batch | {"position_ids": positions},
        "context or sequence parallelism": batch | {"shift_labels": shifted},
    }


@pytest.mark.parametrize("reason", ["even number of rows", "hole", "position_ids", "context or sequence parallelism"])
def test_a_batch_that_cannot_be_served_is_padded_and_says_so_once(batch, caplog, reason):
    special = unserved_batches(batch)[reason]
    ours, theirs = both("Llama")
    for _ in range(2):
        output = ours(**special, fused_lm_head=True)
    assert torch.equal(output.log_probs, theirs(**special, fused_lm_head=True).log_probs)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and reason in lines[0]


def test_text_on_a_model_that_sees_gets_the_engine(batch):
    text = tiny_model("Gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_id=120,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [transformers.Gemma3ForConditionalGeneration(config).eval()]
    models.append(copy.deepcopy(models[0]))
    reports = []
    add_pair_forward(models[0], outputs=FIELDS, on_report=reports.append)
    add_fused_lm_head(models[1], outputs=FIELDS)
    batch["input_ids"].clamp_(max=119)
    batch["labels"].clamp_(max=119)
    assert_same_output(*(model(**batch, fused_lm_head=True) for model in models))
    assert reports[0].layout == "shared"
    assert models[0].config.vision_config._attn_implementation == "sdpa"
    pixels = torch.zeros(1, 3, 28, 28)
    with pytest.raises(ValueError, match="mage"):  # the model's own complaint: no image tokens in the text
        models[0](**batch, pixel_values=pixels, fused_lm_head=True)


@pytest.mark.parametrize("name", ["Bloom", "FalconH1"])
def test_an_architecture_without_attention_backends_is_padded(batch, caplog, name):
    ours, theirs = both(name)
    assert "attention cannot be replaced" in caplog.text
    assert_same_output(*(model(**batch, fused_lm_head=True) for model in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_only_a_mask_tells_is_padded(batch, caplog, dtype):
    """Without a mask such a layer sees the whole row, by less than bfloat16's rounding in a small model."""
    window = {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    ours, theirs = (model.to(dtype) for model in both("Qwen2Moe", **window))
    assert "their window of 4 tokens from a mask" in caplog.text
    assert_same_output(*(model(**batch, fused_lm_head=True) for model in (ours, theirs)))


def test_a_window_that_its_layers_hand_on_is_served(caplog):
    both("Mistral")
    assert "window" not in caplog.text


def test_layers_with_another_memory_than_attention_are_padded(caplog):
    model = tiny_model("Llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    add_pair_forward(model)
    assert "linear_attention" in caplog.text


def test_padded_is_trls_forward(batch):
    ours, theirs = tiny_model("Llama"), tiny_model("Llama")
    reports = []
    add_pair_forward(ours, layout="padded", on_report=reports.append)
    add_fused_lm_head(theirs)
    outputs = [model(**batch, fused_lm_head=True).log_probs for model in (ours, theirs)]
    assert torch.equal(*outputs) and ours.config._attn_implementation == "sdpa"
    assert [str(report) for report in reports] == ["LlamaForCausalLM: layout padded, because it was asked for"]


@pytest.mark.parametrize("fault", ["falcon", "positions", "prefix", "window", "crash"])
def test_the_probe_catches(batch, caplog, monkeypatch, fault):
    name = {"falcon": "FalconH1", "window": "Mistral"}.get(fault, "Llama")
    ours = tiny_model(name)
    real_plan, real_call = forward.lay_out_pairs, forward.PairAttention.__call__

    def call(self, query, key, value, **options):
        if fault == "crash":
            raise RuntimeError("no such kernel")
        return real_call(self, query, key, value, **(options | {"window": None}))

    def plan(*args, **kwargs):
        made = real_plan(*args, **kwargs)
        if fault == "positions":
            made.position_ids.copy_(torch.arange(made.n_tokens))
        else:
            segments = tuple(segment._replace(prefix_end=segment.prefix_start) for segment in made.segments)
            object.__setattr__(made, "segments", segments)
        return made

    if fault == "falcon":
        monkeypatch.setattr(transformers.FalconH1PreTrainedModel, "_supports_attention_backend", True, raising=False)
    elif fault in ("window", "crash"):
        monkeypatch.setattr(forward.PairAttention, "__call__", call)
    else:
        monkeypatch.setattr(forward, "lay_out_pairs", plan)
    theirs = tiny_model(name)
    reports = []
    add_pair_forward(ours, outputs=FIELDS, on_report=reports.append)
    add_fused_lm_head(theirs, outputs=FIELDS)
    assert_same_output(*(model(**batch, fused_lm_head=True) for model in (ours, theirs)))
    assert reports[0].layout == "padded" and reports[0].reason in caplog.text
    assert ours.config._attn_implementation == "sdpa"


def test_the_verdict_is_remembered(batch, tmp_path, monkeypatch):
    first = tiny_model("Llama")
    add_pair_forward(first, cache_dir=tmp_path / "memory")
    with backbone_calls(first) as calls:
        first(**batch, fused_lm_head=True)
    assert len(calls) == 4  # a look at the logits, the probe in both layouts, then the batch

    again, reports = tiny_model("Llama", seed=1), []
    add_pair_forward(again, cache_dir=tmp_path / "memory", on_report=reports.append)
    with backbone_calls(again) as calls:
        again(**batch, fused_lm_head=True)
    assert len(calls) == 2 and reports[0].layout == "shared" and reports[0].difference < 1e-5

    other = tiny_model("Llama", hidden_act="gelu")
    add_pair_forward(other, cache_dir=tmp_path / "memory")
    with backbone_calls(other) as calls:
        other(**batch, fused_lm_head=True)
    assert len(calls) == 4


def test_the_reference_need_not_be_probed_after_the_policy(batch):
    policy, reference = tiny_model("Llama"), tiny_model("Llama")
    findings = Findings()
    for model in (policy, reference):
        add_pair_forward(model, findings=findings, cache_dir="/dev/null/not_writable")
    policy(**batch, fused_lm_head=True)
    with backbone_calls(reference) as calls:
        reference(**batch, fused_lm_head=True)
    assert len(calls) == 1


def test_the_probe_sees_no_dropout(batch):
    model, reports = tiny_model("GPT2").train(), []  # GPT-2 drops by default
    add_pair_forward(model, on_report=reports.append)
    model(**batch, fused_lm_head=True)
    assert reports[0].layout == "shared" and reports[0].difference < 1e-6


WIDE = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}


def test_the_probe_sees_the_precision_of_the_call(batch):
    """Float32 weights are not what autocast computes in: a kernel of half precision would be met in step 1."""
    model, reports = tiny_model("Llama", **WIDE).train(), []
    add_pair_forward(model, on_report=reports.append)
    attended = []
    with spy(model, attended), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, fused_lm_head=True)
    assert attended[0] == torch.bfloat16
    assert reports[0].layout == "shared" and 1e-5 < reports[0].difference < tolerance(torch.bfloat16)


def test_the_probe_under_autocast_leaves_the_gradients_alone(batch):
    """Autocast keeps the weights that it has cast: made without gradients, they would have none in training."""
    model = tiny_model("Llama").train()
    add_pair_forward(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_another_precision_is_probed_again(batch, tmp_path):
    model = tiny_model("Llama", **WIDE)
    for autocast in (False, True):
        again, reports = copy.deepcopy(model), []
        add_pair_forward(again, on_report=reports.append, cache_dir=tmp_path)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            again(**batch, fused_lm_head=True)
        assert (reports[0].difference > 1e-5) == autocast


@pytest.mark.parametrize("told", [0, 300])
def test_longer_rows_are_probed_again(caplog, monkeypatch, told):
    """Attention that goes wrong behind 200 tokens, as a window or a switch of LongRoPE would have it."""
    real_call = forward.PairAttention.__call__

    def call(self, query, key, value, **options):
        output = real_call(self, query, key, value, **options)
        return output if self.places.max_k < 200 else output.flip(1)

    monkeypatch.setattr(forward.PairAttention, "__call__", call)
    ours, theirs = tiny_model("Llama", max_position_embeddings=512), tiny_model("Llama", max_position_embeddings=512)
    reports = []
    add_pair_forward(ours, on_report=reports.append, longest=told)
    add_fused_lm_head(theirs)
    for longest in (24, 300):
        batch = collate([{"prompt_ids": list(range(3, 20)), "chosen_ids": [5] * longest, "rejected_ids": [6]}])
        assert_close(*(model(**batch, fused_lm_head=True).log_probs for model in (ours, theirs)))
    assert [report.layout for report in reports] == (["padded"] if told else ["shared", "padded"])


@contextlib.contextmanager
def spy(model, attended):
    """The dtypes that the first layer's attention hands to its projection."""
    projection = model.model.layers[0].self_attn.o_proj
    with projection.register_forward_pre_hook(lambda module, args: attended.append(args[0].dtype)):
        yield


def test_a_remembered_fault_is_still_a_fault(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(probe.ProbeCache, "read", lambda self, key: 0.5)
    model, reports = tiny_model("Llama"), []
    add_pair_forward(model, on_report=reports.append)
    model(**batch, fused_lm_head=True)
    assert reports[0].layout == "padded" and "5.0e-01" in reports[0].reason


def test_the_probe_leaves_the_model_as_it_was(batch):
    model = perturbed(tiny_model("Llama")).train()
    model.model.layers[0].eval()
    add_pair_forward(model)
    state = torch.get_rng_state()
    model(**batch, fused_lm_head=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.model.layers[1].mlp.training
    assert not model.model.layers[0].training and not model.model.layers[0].mlp.training


def test_the_name_in_trl_is_put_back():
    original = dpo_trainer.add_fused_lm_head
    with pytest.raises(RuntimeError), pair_engine():
        assert dpo_trainer.add_fused_lm_head is not original
        raise RuntimeError
    assert dpo_trainer.add_fused_lm_head is original
