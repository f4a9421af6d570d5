"""What CUDA's kernels take, by numbers computed by hand."""

from tandem.training.cuda_memory import flash_backward, head_tile, nccl_buffers
from tandem.widths import Widths


def attention(heads: int, groups: int, head: int) -> Widths:
    """A model with such heads; its other sizes take no part."""
    return Widths(1, heads * head, 1000, heads, groups, head, 64, 1)


def test_flash_attentions_backward_of_llama_3_8b():
    """16,384 tokens in 8 sequences without a shared prompt, bfloat16."""
    rows = 16_384 + 8 * 128
    dq, row_sums = rows * 4096 * 4, rows * 32 * 4
    dk_and_dv = 2 * 16_384 * 4096 * 2
    assert (dq, row_sums, dk_and_dv) == (285_212_672, 2_228_224, 268_435_456)
    assert flash_backward(attention(32, 8, 128), 16_384, 16_384, 8, 2) == 555_876_352  # 0.52 GiB


def test_heads_are_padded_and_not_expanded_where_each_has_its_keys():
    assert flash_backward(attention(2, 2, 80), 100, 140, 1, 2) == (100 + 128) * 2 * (96 + 1) * 4
    assert flash_backward(attention(1, 1, 160), 100, 140, 1, 2) == (100 + 128) * (192 + 1) * 4


def test_keys_that_are_read_twice_are_expanded_twice():
    shared = attention(4, 1, 64)
    more = flash_backward(shared, 100, 300, 2, 2) - flash_backward(shared, 100, 200, 2, 2)
    assert more == 2 * 100 * 4 * 64 * 2


def test_a_model_without_attention_takes_nothing_for_it():
    assert flash_backward(attention(0, 0, 0), 100, 300, 2, 2) == 0


def test_the_heads_tile_and_nccls_buffers():
    assert head_tile(10_000, 2) == 268_435_456  # 4,096 x 32,768 in bfloat16
    assert head_tile(100, 4) == 100 * 32_768 * 4
    assert nccl_buffers(8) == 256 * 2**20  # 4 MiB x 32 channels x 2
    assert nccl_buffers(1) == 0
