import itertools
import sys
import types

import pytest
import torch
from torch.testing import assert_close

from tandem.engine import attention, kernels
from tandem.engine.attention import PairAttention, UnsupportedAttention
from tandem.engine.layout import lay_out_pairs
from tests.engine.tiny_models import collate, random_pairs, tiny_model

HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture
def plan():
    batch = collate(random_pairs(3, seed=3))
    return lay_out_pairs(**batch)


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
    monkeypatch.setattr(attention, "CPU_QUERY_BLOCK", request.param)


@pytest.mark.usefixtures("query_block")
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("backend", ["sdpa", "dense", "varlen"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_every_backend_is_the_definition(monkeypatch, states, window, scale, backend, layout):
    plan = lay_out_pairs(**collate(random_pairs(3, seed=3)), layout=layout)
    states = [torch.randn(1, s.shape[1], plan.n_tokens, DIM, dtype=torch.float64, requires_grad=True) for s in states]
    monkeypatch.setattr(kernels.varlen, "varlen_attn", emulated_varlen)
    output = PairAttention(plan, backend)(*states, scale=scale, window=window)
    expected = explicit_attention(plan, *states, scale=scale, window=window)
    assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(output, states), gradients(expected, states), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_call_on_the_cpu_sees_no_keys_behind_its_last_query(monkeypatch, plan, states):
    monkeypatch.setattr(attention, "CPU_QUERY_BLOCK", 3)
    calls = []

    def attend(query, key, value, **_):
        calls.append((query.shape[2], key.shape[2]))
        return query

    monkeypatch.setattr(attention, "sdpa", attend)
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

    monkeypatch.setattr(kernels.varlen, "varlen_attn", kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = PairAttention(plan, backend)(query, key, value.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), PairAttention(plan)(query, key, value), rtol=0.05, atol=0.05)


@pytest.fixture
def fresh_kernels():
    """Neither an import nor a capability remembered from elsewhere."""
    remembered = (kernels.flash_attn_varlen, kernels.capability, attention.say_once)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.usefixtures("fresh_kernels")
def test_flash_attn_is_called_as_it_documents(monkeypatch, plan, states):
    calls = []

    class Package:
        @staticmethod
        def flash_attn_varlen_func(*arguments, **options):
            calls.append((arguments, options))
            return arguments[0]

    monkeypatch.setitem(sys.modules, "flash_attn", Package)
    PairAttention(plan, "varlen")(*states, window=4, softcap=5.0, scale=0.5, dropout=0.1)
    (_, _, _, cu_q, cu_k, max_q, max_k), options = calls[0]
    assert cu_q is plan.cu_seq_q and cu_k is plan.cu_seq_k and (max_q, max_k) == (plan.max_q, plan.max_k)
    assert options == {
        "dropout_p": 0.1, "softmax_scale": 0.5, "causal": True, "window_size": (3, 0), "softcap": 5.0
    }  # fmt: skip


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize("broken", [None, "lacks the function", ImportError("undefined symbol"), OSError("libcudart")])
def test_flash_attn_is_tried_and_not_believed(monkeypatch, broken):
    """flash-attn 4 has the name and lacks the function; a build for another torch fails while it is loaded."""
    looks = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "flash_attn":
                looks.append(name)
                if isinstance(broken, Exception):
                    raise broken

    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    if broken == "lacks the function":
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    for _ in range(64):
        assert kernels.flash_attn_varlen() is None
    assert len(looks) <= 1, "every layer would look again"


def test_torch_without_a_flag_for_grouped_heads(monkeypatch, plan, states):
    """torch 2.11's `varlen_attn` has no `enable_gqa`; its kernel takes grouped heads all the same."""

    def without(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return emulated_varlen(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
        )

    monkeypatch.setattr(kernels.varlen, "varlen_attn", without)
    assert_close(PairAttention(plan, "varlen")(*states), PairAttention(plan, "sdpa")(*states))


HALF, SINGLE, CUDA = torch.bfloat16, torch.float32, torch.device("cuda", 0)


@pytest.mark.usefixtures("fresh_kernels")
@pytest.mark.parametrize(
    ("capability", "dtype", "dims", "reason"),
    [
        ((8, 0), HALF, (64, 64), ""),
        ((9, 0), torch.float16, (256, 256), ""),
        ((7, 5), torch.float16, (64, 64), "capability 7.5"),
        ((7, 0), HALF, (64, 64), "capability 7.0"),
        ((9, 0), HALF, (20, 20), "heads of 20"),
        ((9, 0), HALF, (264, 264), "heads of 264"),
        ((9, 0), HALF, (192, 128), "differ"),
        ((9, 0), SINGLE, (64, 64), "float32"),
        ((8, 6), HALF, (208, 208), "no backward for heads of 208"),
        ((12, 0), HALF, (224, 224), "no backward for heads of 224"),
        ((8, 9), HALF, (256, 256), ""),
        ((9, 0), HALF, (208, 208), ""),
    ],
)
def test_what_reaches_the_flash_kernel(monkeypatch, capability, dtype, dims, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert reason in kernels.without_flash(CUDA, dtype, dims)
    assert bool(reason) == bool(kernels.without_flash(CUDA, dtype, dims))
    # What no flash kernel takes goes to one without grouped heads: expanded, or quadratic in memory
    assert kernels.sdpa_groups_heads(CUDA, dtype, dims, masked=False) == (not reason)
    assert not kernels.sdpa_groups_heads(CUDA, dtype, dims, masked=True)
    assert kernels.sdpa_groups_heads(torch.device("cpu"), dtype, dims, masked=True)


@pytest.mark.usefixtures("fresh_kernels")
def test_dropout_over_the_largest_heads_needs_a_large_card(monkeypatch):
    for capability, reason in (((8, 6), "heads of 256 with dropout"), ((8, 0), "")):
        kernels.capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert reason in kernels.without_flash(CUDA, HALF, (256, 256), dropout=True)
        assert bool(reason) == bool(kernels.without_flash(CUDA, HALF, (256, 256), dropout=True))


def test_expanded_heads_attend_as_grouped_ones(monkeypatch, plan, states):
    grouped = PairAttention(plan, "sdpa")(*states)
    seen = []
    monkeypatch.setattr(kernels, "sdpa_groups_heads", lambda *_, **__: False)
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda *args, **options: seen.append(options["enable_gqa"]) or real(*args, **options),
    )
    assert_close(PairAttention(plan, "sdpa")(*states), grouped)
    assert seen and not any(seen)


@pytest.mark.usefixtures("fresh_kernels")
def test_the_probe_remembers_by_kernel_and_card(monkeypatch):
    described = set()
    for capability in ((8, 0), (9, 0)):
        for package in (None, lambda: None):
            kernels.capability.cache_clear()
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            monkeypatch.setattr(kernels, "flash_attn_varlen", lambda found=package: found)
            described |= {kernels.description(CUDA, dtype) for dtype in (HALF, SINGLE)}
    assert len(described) == 8


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


def test_the_public_setter_looks_for_our_name_on_the_hub():
    """Why `_attn_implementation` is set instead (`contract`): once it takes the name, the public way will do."""
    model, name = tiny_model("Llama"), "tandem|flash_attention_2"
    attention.AttentionInterface.register(name, attention.AttentionInterface()["sdpa"])
    with pytest.raises(ValueError, match="Could not find the currently requested flash attention"):
        model.set_attn_implementation(name)


@pytest.mark.parametrize("extra", [{"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_the_row_cannot_express_is_refused(plan, states, extra):
    attention.switch_implementation(tiny_model("Llama").config)
    function = attention.AttentionInterface()["tandem|sdpa"]
    with pytest.raises(UnsupportedAttention):
        function(torch.nn.Identity(), *states, None, pair_attention=PairAttention(plan), **extra)


@pytest.mark.parametrize("window", [None, 300])
def test_masks_grow_with_the_longest_sequence_and_not_with_its_square(window):
    """A pair of 3,000 tokens: its blocks' masks on the CPU are views of one."""
    prompt, answers = [5] * 1000, ([6] * 1000, [7] * 1001)
    ids = torch.tensor([prompt + answers[0] + [0], prompt + answers[1]])
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = torch.where((mask == 1) & (torch.arange(ids.shape[1]) >= 1000), ids, -100)
    plan = lay_out_pairs(ids, mask, labels)
    states = [torch.randn(1, 1, plan.n_tokens, 8) for _ in range(3)]
    forward = PairAttention(plan, "sdpa")
    forward(*states, window=window)
    held = sum(each.numel() * each.element_size() for each in forward._masks.values())
    assert held <= attention.CPU_QUERY_BLOCK * plan.max_k
