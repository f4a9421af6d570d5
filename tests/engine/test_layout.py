import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.layout import lay_out_pairs

# Two tokens only, so that rows share prefixes, completions begin alike and whole rows are equal often
tokens = st.lists(st.integers(5, 6), max_size=5)
pair = st.tuples(tokens, tokens, tokens, st.integers(0, 2), st.integers(0, 2))


def grid(rows, starts, width):
    """(2B, S) tensors of rows of (prompt, completion), each row beginning at its own column."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, ((prompt, completion), start) in enumerate(zip(rows, starts, strict=True)):
        for offset, token in enumerate([*prompt, *completion]):
            ids[row, start + offset], mask[row, start + offset] = token, 1
            if offset >= len(prompt):
                labels[row, start + offset] = token
    return ids, mask, labels


@st.composite
def batches(draw):
    """Batches as TRL collates and truncates them, and left-padded ones."""
    pairs = draw(st.lists(pair, min_size=1, max_size=4))
    limit = draw(st.integers(1, 12))
    keep = draw(st.sampled_from([slice(None, limit), slice(-limit, None)]))
    left = draw(st.booleans())
    rows = []
    for answer in (1, 2):
        for one in pairs:
            flags = ([0] * len(one[0]) + [1] * len(one[answer]))[keep]
            ids = (one[0] + one[answer])[keep]
            rows.append((ids[: flags.count(0)], ids[flags.count(0) :]))
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    width += draw(st.integers(0, 2)) + (width == 0)
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    starts = [width - length for length in lengths] if left else [0] * len(rows)
    return grid(rows, starts, width)


def attention_sets(plan):
    """For every packed token, the packed tokens its query sees, in order: the segments taken literally."""
    sets = {}
    for segment in plan.segments:
        keys = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, segment.end)]
        for query in range(segment.start, segment.end):
            assert query not in sets, "a token is the query of one sequence only"
            sets[query] = [key for key in keys if key <= query]
    return sets


def varlen_attention_sets(plan):
    """The same from the cumulative lengths, as flash attention reads them: causal, aligned bottom-right."""
    sets = {}
    cu_q, cu_k = plan.cu_seq_q.tolist(), plan.cu_seq_k.tolist()
    for q_start, q_end, k_start, k_end in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        for i in range(q_end - q_start):
            visible = (k_end - k_start) - (q_end - q_start) + i + 1
            sets[q_start + i] = plan.key_index[k_start : k_start + visible].tolist()
    return sets


def context(ids, mask, row, column):
    """(column, token) of everything up to and including `column` in a row of the padded grid."""
    return [(c, ids[row, c].item()) for c in range(column + 1) if mask[row, c]]


@pytest.mark.parametrize("layout", ["shared", "packed"])
@settings(max_examples=300, deadline=None)
@given(batch=batches())
def test_each_token_is_scored_once_from_exactly_its_context(layout, batch):
    ids, mask, labels = batch
    scored = {(r, c) for r in range(len(ids)) for c in range(1, ids.shape[1]) if labels[r, c] != -100}
    if not mask.any() or any(not mask[r, c - 1] for r, c in scored):
        # nothing to forward, or a completion without anything before it that left padding would have it predicted from
        with pytest.raises(ValueError, match=r"no tokens|nothing predicts"):
            lay_out_pairs(ids, mask, labels, layout)
        return
    plan = lay_out_pairs(ids, mask, labels, layout)

    # What each packed token sees is a list of (position, token): its context
    tokens = ids.flatten()[plan.token_index].tolist()
    positions = plan.position_ids[0].tolist()
    sees = attention_sets(plan)
    assert sees == varlen_attention_sets(plan)
    assert sorted(sees) == list(range(plan.n_tokens))
    contexts = {query: [(positions[key], tokens[key]) for key in keys] for query, keys in sees.items()}

    columns = ids.shape[1]
    slots = [divmod(slot, columns - 1) for slot in plan.score_slots.tolist()] if columns > 1 else []
    assert len(slots) == len(set(slots)) and {(row, column + 1) for row, column in slots} == scored
    for (row, column), index, target in zip(slots, plan.score_index.tolist(), plan.targets.tolist(), strict=True):
        assert contexts[index] == context(ids, mask, row, column)
        assert target == labels[row, column + 1]

    # Then a backward that adds atomically adds at most two numbers, whose sum is the same in either order
    for index in (plan.key_index, plan.score_index):
        assert not len(index) or index.bincount().max() <= 2

    assert plan.multiplicity.sum() == mask.sum()
    assert plan.cu_seq_q.dtype == plan.cu_seq_k.dtype == torch.int32
    assert plan.max_q == max(segment.q_length for segment in plan.segments)
    assert plan.max_k == max(segment.k_length for segment in plan.segments)
    if layout == "packed":
        assert plan.n_tokens == mask.sum()
    else:
        # every distinct (pair, context) once: nothing that could be shared within a pair is forwarded twice
        pairs = len(ids) // 2
        distinct = {
            (row % pairs, tuple(context(ids, mask, row, column)))
            for row in range(len(ids))
            for column in range(columns)
            if mask[row, column]
        }
        assert plan.n_tokens == len(distinct)


def test_a_batch_by_hand():
    # pair 0: prompt 10 11, chosen 12, rejected 13 14; pair 1: prompt 20, chosen 21 22, rejected 23
    ids = torch.tensor([[10, 11, 12, 0], [20, 21, 22, 0], [10, 11, 13, 14], [20, 23, 0, 0]])
    labels = torch.tensor([[-100, -100, 12, -100], [-100, 21, 22, -100], [-100, -100, 13, 14], [-100, 23, -100, -100]])
    plan = lay_out_pairs(ids, (ids != 0).long(), labels)
    assert ids.flatten()[plan.token_index].tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23]
    assert plan.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert plan.multiplicity.tolist() == [[2, 2, 1, 1, 1, 2, 1, 1, 1]]
    assert plan.cu_seq_q.tolist() == [0, 3, 5, 8, 9]
    assert plan.cu_seq_k.tolist() == [0, 3, 7, 10, 12]
    assert plan.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 5, 8]
    assert (plan.max_q, plan.max_k) == (3, 4)
    # chosen rows first, as in the grid; both first tokens of pair 0 are predicted from token 11, at packed place 1
    assert plan.score_index.tolist() == [1, 5, 6, 1, 3, 5]
    assert plan.targets.tolist() == [12, 21, 22, 13, 14, 23]
    assert plan.scatter(torch.arange(1.0, 7.0)).tolist() == [[0, 1, 0], [2, 3, 0], [0, 4, 5], [6, 0, 0]]


def test_a_group_by_hand():
    """Prompt 10 11, chosen 12 9, rejected 13 and 12 14; then another prompt. Chosen is read from the first pair's."""
    chosen, other = [10, 11, 12, 9], [20, 21, 0, 0]
    ids = torch.tensor([chosen, chosen, other, [10, 11, 13, 0], [10, 11, 12, 14], [20, 22, 0, 0]])
    labels = torch.where((ids < 10) | (ids > 11), ids, -100).masked_fill((ids == 0) | (ids == 20), -100)
    plan = lay_out_pairs(ids, (ids != 0).long(), labels, groups=[0, 0, 1])
    assert ids.flatten()[plan.token_index].tolist() == [*chosen, 13, 14, 20, 21, 22]
    assert plan.multiplicity.tolist() == [[4, 4, 3, 2, 1, 1, 2, 1, 1]]
    assert plan.cu_seq_q.tolist() == [0, 4, 5, 6, 8, 9]
    assert plan.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 5, 6, 7, 6, 8]
    # 12 and 9 of chosen once; of the second rejected answer 12 is predicted where chosen's is
    assert plan.targets.tolist() == [12, 9, 21, 13, 12, 14, 22]
    assert plan.score_index.tolist() == [1, 2, 6, 1, 1, 2, 6]
    values = torch.arange(1.0, 8.0, requires_grad=True)
    grid = plan.scatter(values)
    assert grid.tolist() == [[0, 1, 2], [0, 1, 2], [3, 0, 0], [0, 4, 0], [0, 5, 6], [7, 0, 0]]
    grid.sum().backward()
    assert values.grad.tolist() == [2, 2, 1, 1, 1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_groups_share_all_that_their_pairs_begin_with(data):
    groups = data.draw(st.lists(st.tuples(pair, st.lists(tokens, max_size=3)), min_size=1, max_size=3))
    pairs = [(one[0], one[1], rejected) for one, more in groups for rejected in (one[2], *more)]
    numbers = [number for number, (_, more) in enumerate(groups) for _ in range(1 + len(more))]
    rows = [(prompt, answer) for side in (1, 2) for prompt, answer in ((each[0], each[side]) for each in pairs)]
    width = max(len(prompt) + len(answer) for prompt, answer in rows) or 1
    ids, mask, labels = grid(rows, [0] * len(rows), width)
    try:
        alone = lay_out_pairs(ids, mask, labels)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            lay_out_pairs(ids, mask, labels, groups=numbers)
        return
    plan = lay_out_pairs(ids, mask, labels, groups=numbers)

    # A hash of what each packed token sees stands for its log-prob: both layouts must fill the grid with the same
    def seen(layout):
        tokens, positions = ids.flatten()[layout.token_index].tolist(), layout.position_ids[0].tolist()
        sees = attention_sets(layout)
        assert sees == varlen_attention_sets(layout)
        context = {q: hash(tuple((positions[k], tokens[k]) for k in keys)) % 1000 for q, keys in sees.items()}
        values = [context[index] + 1 for index in layout.score_index.tolist()]
        return layout.scatter(torch.tensor(values, dtype=torch.float64))

    assert torch.equal(seen(plan), seen(alone))
    assert plan.multiplicity.sum() == alone.multiplicity.sum() == mask.sum()
    first = {number: numbers.index(number) for number in numbers}
    kept = {
        (number, tuple(context(ids, mask, row, column)))
        for pair_, number in enumerate(numbers)
        for row in (first[number], len(pairs) + pair_)
        for column in range(width)
        if mask[row, column]
    }
    assert plan.n_tokens >= len(kept)  # more only where two rejected answers share what chosen has not
    assert plan.n_tokens <= alone.n_tokens


def test_prompts_cut_at_different_places_share_nothing():
    # keep_end truncation of prompt 1 2 3 with a short and a long answer
    ids = torch.tensor([[1, 2, 3, 7], [3, 8, 8, 9]])
    labels = torch.tensor([[-100, -100, -100, 7], [-100, 8, 8, 9]])
    plan = lay_out_pairs(ids, torch.ones_like(ids), labels)
    assert plan.n_tokens == 8 and plan.multiplicity.max() == 1


def test_equal_answers_are_forwarded_once_and_scored_twice():
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    labels = torch.tensor([[-100, 2, 3], [-100, 2, 3]])
    plan = lay_out_pairs(ids, torch.ones_like(ids), labels)
    assert plan.n_tokens == 3 and len(plan.segments) == 1
    assert plan.score_index.tolist() == [0, 1, 0, 1]


def test_the_scattered_grid_keeps_the_gradient_when_nothing_is_scored():
    ids = torch.tensor([[1, 2], [1, 3]])
    plan = lay_out_pairs(ids, torch.ones_like(ids), torch.full_like(ids, -100))
    values = torch.zeros(0, requires_grad=True)
    grid = plan.scatter(values)
    grid.sum().backward()
    assert grid.tolist() == [[0], [0]] and values.grad.shape == (0,)


@pytest.mark.parametrize(
    ("mask", "labels", "message"),
    [
        ([[1, 0, 1], [1, 1, 1]], [[-100] * 3] * 2, "hole"),
        ([[0, 0, 0], [0, 0, 0]], [[-100] * 3] * 2, "no tokens"),
        ([[1, 1, 0], [1, 1, 1]], [[-100, -100, 5], [-100] * 3], "padding"),
        ([[0, 1, 1], [1, 1, 1]], [[-100, 5, 5], [-100] * 3], "padding"),
        ([[1, 1, 1]], [[-100] * 3], "even"),
    ],
)
def test_batches_that_are_no_padded_pairs_are_refused(mask, labels, message):
    ids = torch.full((len(mask), 3), 5)
    with pytest.raises(ValueError, match=message):
        lay_out_pairs(ids, torch.tensor(mask), torch.tensor(labels))


def test_a_plan_goes_to_a_device_in_one_copy(monkeypatch):
    ids = torch.tensor([[10, 11, 12], [10, 11, 13]])
    plan = lay_out_pairs(ids, torch.ones_like(ids), torch.where(ids > 11, ids, -100))
    moved = []
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **options: moved.append(options) or real(self, *args, **options)
    )
    there = plan.to("meta", non_blocking=True)
    assert moved == [{"non_blocking": True}]
    assert there.token_index.is_meta and there.score_slots.is_meta
    assert there.segments == plan.segments and there.max_k == plan.max_k == 3
