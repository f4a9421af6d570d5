import itertools

import pytest
import torch
from torch.testing import assert_close

from tandem.engine import attention
from tandem.engine.attention import PairAttention, UnsupportedAttention
from tandem.engine.layout import plan_pairs
from tests.engine.tiny_models import collate, random_pairs, tiny_model

HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture
def plan():
    batch = collate(random_pairs(3, seed=3))
    return plan_pairs(**batch)


@pytest.fixture
def states(plan):
    """Query, key and value of the packed row, wanting gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, plan.n_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def explicit_attention(plan, query, key, value, *, scale=None, window=None, softcap=None, sinks=None):
    """One query at a time over the list of keys it may see, from the definition."""
    scale = DIM**-0.5 if scale is None else scale
    positions = plan.position_ids[0].tolist()
    outputs = torch.zeros(1, plan.n_tokens, HEADS, DIM, dtype=query.dtype)
    rows = {}
    for segment in plan.segments:
        own = range(segment.start, segment.end)
        for token in own:
            rows[token] = [k for k in (*range(segment.prefix_start, segment.prefix_end), *own) if k <= token]
    for token, head in itertools.product(range(plan.n_tokens), range(HEADS)):
        seen = [k for k in rows[token] if window is None or positions[token] - positions[k] < window]
        group = head // (HEADS // KV_HEADS)
        scores = (key[0, group, seen] @ query[0, head, token]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp()
        total = weights.sum() + (0 if sinks is None else sinks[head].exp())
        outputs[0, token, head] = (weights / total) @ value[0, group, seen]
    return outputs


def emulated_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`torch.nn.attention.varlen.varlen_attn` as documented, one sequence after the other."""
    assert query.dim() == key.dim() == 3 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    outputs = torch.empty_like(query)
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    for q0, q1, k0, k1 in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        groups = query.shape[1] // key.shape[1]
        keys, values = (states[k0:k1].repeat_interleave(groups, 1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * scale
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        hidden = (behind < 0) | ((behind > window_size[0]) if window_size[0] >= 0 else False)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs[q0:q1] = torch.einsum("hqk,khd->qhd", weights, values)
    return outputs


def gradients(output, states):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weight).sum(), states)


@pytest.fixture(params=[2, 128], ids="{} queries a call".format)
def query_block(request, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_QUERY_BLOCK", request.param)


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("backend", ["sdpa", "dense", "varlen"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_every_backend_is_the_definition(monkeypatch, states, window, scale, backend, layout):
    plan = plan_pairs(**collate(random_pairs(3, seed=3)), layout=layout)
    states = [torch.randn(1, s.shape[1], plan.n_tokens, DIM, dtype=torch.float64, requires_grad=True) for s in states]
    monkeypatch.setattr(attention.varlen, "varlen_attn", emulated_varlen)
    output = PairAttention(plan, backend)(*states, scale=scale, window=window)
    expected = explicit_attention(plan, *states, scale=scale, window=window)
    assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(output, states), gradients(expected, states), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_call_on_the_cpu_sees_no_keys_behind_its_last_query(monkeypatch, plan, states):
    monkeypatch.setattr(attention, "_CPU_QUERY_BLOCK", 3)
    calls = []

    def attend(query, key, value, **_):
        calls.append((query.shape[2], key.shape[2]))
        return query

    monkeypatch.setattr(attention, "_sdpa", attend)
    PairAttention(plan, "sdpa")(*states)
    for segment in plan.segments:
        queries, keys = 0, segment.k_length - segment.q_length
        while queries < segment.q_length:
            length, seen = calls.pop(0)
            queries, keys = queries + length, keys + length
            assert length <= 3 and seen == keys
    assert not calls and max(segment.q_length for segment in plan.segments) > 3


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize("window", [None, 3])
def test_soft_capping_and_sinks_are_the_definition(plan, states, window):
    sinks = torch.linspace(-1, 2, HEADS, dtype=torch.float64).requires_grad_()
    for options in ({"softcap": 0.5}, {"sinks": sinks}, {"softcap": 0.5, "sinks": sinks}):
        output = PairAttention(plan)(*states, window=window, **options)
        assert_close(output, explicit_attention(plan, *states, window=window, **options), rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert sinks.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("sdpa", {"softcap": 1.0}),
        ("sdpa", {"sinks": torch.zeros(HEADS)}),
        ("varlen", {"softcap": 1.0}),
        ("varlen", {"sinks": torch.zeros(HEADS)}),
        ("varlen", {"dropout": 0.1}),
    ],
)
def test_a_forced_backend_says_what_it_lacks(plan, states, backend, options):
    with pytest.raises(UnsupportedAttention):
        PairAttention(plan, backend)(*states, **options)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
def test_dropout_drops(plan, states, backend):
    kept = PairAttention(plan, backend)(*states)
    dropped = PairAttention(plan, backend)(*states, dropout=0.5)
    assert not torch.allclose(kept, dropped)


@pytest.mark.parametrize("backend", ["sdpa", "dense", "varlen"])
def test_autocast_attends_in_its_dtype(monkeypatch, plan, states, backend):
    query, key, value = (state.detach().float() for state in states)

    def kernel(*arguments, **options):
        assert {tensor.dtype for tensor in arguments[:3]} == {torch.bfloat16}, "which autocast does not know"
        return emulated_varlen(*arguments, **options)

    monkeypatch.setattr(attention.varlen, "varlen_attn", kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = PairAttention(plan, backend)(query, key, value.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), PairAttention(plan)(query, key, value), rtol=0.05, atol=0.05)


def test_flash_attn_is_called_as_it_documents(monkeypatch, plan, states):
    calls = []

    class Package:
        @staticmethod
        def flash_attn_varlen_func(*arguments, **options):
            calls.append((arguments, options))
            return arguments[0]

    monkeypatch.setitem(__import__("sys").modules, "flash_attn", Package)
    monkeypatch.setattr(attention, "_flash_attn_installed", lambda: True)
    PairAttention(plan, "varlen")(*states, window=4, softcap=5.0, scale=0.5, dropout=0.1)
    (_, _, _, cu_q, cu_k, max_q, max_k), options = calls[0]
    assert cu_q is plan.cu_seq_q and cu_k is plan.cu_seq_k and (max_q, max_k) == (plan.max_q, plan.max_k)
    assert options == {
        "dropout_p": 0.1, "softmax_scale": 0.5, "causal": True, "window_size": (3, 0), "softcap": 5.0
    }  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_switched_model_runs_its_original_without_a_plan(implementation):
    model = tiny_model("Gemma2" if implementation == "eager" else "Mistral")
    assert model.config._attn_implementation == implementation
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    logits = model(prompt).logits
    attention.switch_implementation(model.config)
    assert model.config._attn_implementation == f"tandem|{implementation}"
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), before)
    assert model.config._attn_implementation == f"tandem|{implementation}"
    attention.restore_implementation(model.config)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_the_row_cannot_express_is_refused(plan, states, extra):
    attention.switch_implementation(tiny_model("Llama").config)
    function = attention.AttentionInterface()["tandem|sdpa"]
    with pytest.raises(UnsupportedAttention):
        function(torch.nn.Identity(), *states, None, pair_attention=PairAttention(plan), **extra)
