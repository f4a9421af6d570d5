import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedConfig
from trl.kernels import ChunkedLogProbFunction

from tandem.engine import logprobs
from tandem.engine.logprobs import LogitTransform, score_tokens

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.3, temperature=0.7), LogitTransform(2.0, 3.0, 1.3)]


@pytest.fixture
def head():
    """Hidden states, weight, bias and targets of 11 tokens over 40 words, in float64 for `gradcheck`'s sake."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((11, 6), (40, 6), (40,)))
    targets = torch.randint(40, (11,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


def in_float32(head):
    return [tensor.detach().float() if tensor.is_floating_point() else tensor for tensor in head]


@pytest.fixture(params=[1, 4, 100], ids="{} tokens a chunk".format)
def chunk(request, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 40 * request.param)
    monkeypatch.setattr(logprobs, "MIN_CHUNK_TOKENS", 1)
    monkeypatch.setattr(logprobs, "PIECE_LOGITS", 40 * 3)
    monkeypatch.setattr(logprobs, "BLOCK_WORDS", 16)  # the last of the three blocks is half a block


@pytest.fixture(params=[0, 5, 100], ids="{} tokens kept".format)
def keep(request, monkeypatch):
    """Of how many of the 11 tokens the probabilities may stay for the backward."""
    monkeypatch.setattr(logprobs, "KEPT_PROBS", 40 * request.param)


def from_the_definition(hidden, weight, bias, targets, transform):
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    logits = logits / transform.temperature
    log_p = logits.log_softmax(-1)
    return {
        "log_probs": log_p.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_fields_and_gradients_are_the_definition(head, chunk, keep, transform, with_bias):
    hidden, weight, bias, targets = in_float32(head)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] + ([bias.requires_grad_()] if with_bias else [])
    bias = bias if with_bias else None
    targets[:4] = (hidden @ weight.t()).argmax(-1)[:4]  # some tokens that are the likeliest
    scores = score_tokens(hidden, weight, bias, targets, transform, FIELDS)
    expected = from_the_definition(hidden, weight, bias, targets, transform)
    for name in FIELDS:
        assert_close(getattr(scores, name), expected[name], rtol=1e-5, atol=1e-5)
    assert scores.is_top1.any() and not scores.is_top1.all()

    upstream = torch.linspace(-1, 1, len(targets))
    ours = torch.autograd.grad((scores.log_probs * upstream).sum(), leaves)
    theirs = torch.autograd.grad((expected["log_probs"] * upstream).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_is_computed(head):
    scores = score_tokens(*head, LogitTransform(), ("log_probs", "entropy"))
    assert scores.entropy is not None
    assert scores.mean_logits is scores.is_top1 is scores.log_sum_sq_probs is None
    assert not scores.entropy.requires_grad


def test_a_tie_with_an_earlier_word_is_not_top1():
    scores = score_tokens(torch.ones(2, 1), torch.ones(3, 1), None, torch.tensor([0, 1]), LogitTransform(), FIELDS)
    assert scores.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_frozen_head_gets_no_gradient_and_is_multiplied_once(head, chunk, transform, monkeypatch):
    hidden, weight, bias, targets = in_float32(head)
    upstream = torch.linspace(-1, 1, len(targets))
    expected = from_the_definition(hidden.requires_grad_(), weight, bias, targets, transform)["log_probs"]
    log_probs = score_tokens(hidden, weight, bias, targets, transform).log_probs
    monkeypatch.setattr(logprobs.Head, "logits", None)  # the backward has no need of logits
    (ours,), (theirs,) = (torch.autograd.grad((scores * upstream).sum(), hidden) for scores in (log_probs, expected))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_backward_can_run_twice(head):
    hidden, weight, bias, targets = in_float32(head)
    log_probs = score_tokens(hidden, weight.requires_grad_(), bias, targets, LogitTransform()).log_probs
    first, second = (torch.autograd.grad(log_probs.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens_still_connect_to_the_model(head):
    hidden, weight, bias, targets = head
    scores = score_tokens(hidden[:0], weight, bias, targets[:0], LogitTransform(), FIELDS)
    assert scores.log_probs.shape == (0,)
    scores.log_probs.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_nothing_as_large_as_the_logits_is_kept_or_made(head, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 80)
    monkeypatch.setattr(logprobs, "KEPT_PROBS", 200)
    monkeypatch.setattr(logprobs, "MIN_CHUNK_TOKENS", 2)
    head = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in in_float32(head)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        score_tokens(*head, LogitTransform(), FIELDS)
    assert 4 * 40 in kept and max(kept) == 40 * 6  # whole chunks of two tokens, beside the weight

    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(o))
            return out

    with Sizes():
        score_tokens(*head, LogitTransform(), FIELDS).log_probs.sum().backward()
    assert max(sizes) == 40 * 6  # the weight's gradient; the logits would be 440


@given(tokens=st.integers(0, 3000), vocabulary=st.integers(1, 300_000))
def test_chunks_cover_the_tokens_evenly_within_their_limit(tokens, vocabulary):
    weight = torch.empty(vocabulary, 1, device="meta")
    chunks = list(logprobs.Head(weight, None, LogitTransform(), torch.float32, tokens).chunks())
    assert [token for chunk in chunks for token in range(chunk.start, chunk.stop)] == list(range(tokens))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert all(size <= 64 or size * vocabulary <= logprobs.CHUNK_LOGITS for size in sizes)
    assert not sizes or max(sizes) - min(sizes) < len(sizes)


def test_bf16_is_no_further_from_float32_than_trl(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS_HALF", 1)  # 50 tokens a chunk
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(200, 64, generator=generator), torch.randn(500, 64, generator=generator) / 4
    targets = torch.randint(500, (200,), generator=generator)
    upstream = torch.linspace(-1, 1, 200)
    exact = from_the_definition(hidden.requires_grad_(), weight.requires_grad_(), None, targets, LogitTransform())
    gradients = torch.autograd.grad((exact["log_probs"] * upstream).sum(), [hidden, weight])

    def errors(score):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_probs = score()
        assert log_probs.dtype == torch.float32
        found = torch.autograd.grad((log_probs * upstream).sum(), [hidden, weight])
        pairs = [(log_probs, exact["log_probs"]), *zip(found, gradients, strict=True)]
        return [((one - other).norm() / other.norm()).item() for one, other in pairs]

    ours = errors(lambda: score_tokens(hidden, weight, None, targets, LogitTransform()).log_probs)
    trl = errors(lambda: ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 128, None, 1.0, ())[0])
    for mine, theirs in zip(ours, trl, strict=True):
        # TRL's gradient products leave in float32; bf16 products, as autocast's everywhere else, round once more
        assert 0 < mine <= 1.25 * theirs


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": None}, 1.0),
        ({"logit_scale": 0.0}, 0.0),
        ({"output_multiplier": 2.0}, 2.0),
        ({"lm_head_multiplier": 3.0}, 3.0),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logit_scale": 5.0, "logits_scaling": 4.0}, 5.0),
    ],
)
def test_the_scale_is_read_from_the_config(settings, scale):
    assert LogitTransform.of(PreTrainedConfig(**settings)) == LogitTransform(scale=scale)


def test_the_other_settings_are_read_from_the_config():
    config = PreTrainedConfig(final_logit_softcapping=30.0, logits_scaling=4.0)
    config.model_type = "hyperclovax"
    assert LogitTransform.of(config, temperature=0.5) == LogitTransform(4.0, 30.0, 0.5)


def test_without_a_compiler_for_triton_the_scores_are_ours(head, monkeypatch, caplog):
    monkeypatch.setattr(logprobs, "TRITON_DEVICES", ("cpu",))
    logprobs.triton_fault.cache_clear()
    hidden, weight, bias, targets = in_float32(head)
    theirs = score_tokens(hidden, weight, bias, targets, TRANSFORMS[1], FIELDS)

    def fails(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore")

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", fails)
    logprobs.triton_fault.cache_clear()
    ours = score_tokens(hidden, weight, bias, targets, TRANSFORMS[1], FIELDS)
    score_tokens(hidden, weight, bias, targets, TRANSFORMS[1], FIELDS)
    for name in FIELDS:
        assert_close(getattr(ours, name), getattr(theirs, name))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "Failed to find C compiler" in line and "apt-get install gcc python3-dev" in line and "\n" not in line
    logprobs.triton_fault.cache_clear()
