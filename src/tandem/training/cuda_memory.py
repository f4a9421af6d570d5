"""The memory that a training step takes on a CUDA device beyond that of the CPU's kernels, which a rehearsal counts.

Arithmetic on shapes. Sources: FlashAttention 2's backward in torch (`aten/src/ATen/native/transformers/cuda/flash_attn/
flash_api.cpp`, `mha_varlen_bwd`); TRL 1.16's `ChunkedLogProbFunction`; NCCL's user guide (`NCCL_BUFFSIZE`,
`NCCL_MAX_NCHANNELS`). Nothing here is measured. AdamW adds nothing: `training.gpu` takes the fused one, which makes no
copies.
"""

from transformers import PreTrainedConfig

from tandem.engine.layout import IGNORED_LABEL
from tandem.training.rehearsal import Batch
from tandem.widths import Widths

_FLOAT32 = 4
# Of TRL's kernel (`TOKEN_CHUNK_SIZE`, and the width that its caller gives): tokens and words of a tile of logits
_TILE = (4096, 32768)
# Default size of a channel's buffer, the most channels, and one buffer each to send and to receive
_NCCL = 4 * 2**20 * 32 * 2
# An allowance, not a measurement: blocks are rounded to 512 bytes, segments to 2 MiB, and shapes change
FRAGMENTATION = 1.05


def flash_backward(widths: Widths, tokens: int, keys: int, sequences: int, element: int) -> int:
    """Bytes of the temporary tensors of one layer's backward.

    A float32 sum of dq, whose rows are padded by 128 a sequence and whose heads to a multiple of 32 (beyond 128: 64);
    the softmax's float32 row sums; and where heads of keys are shared, dk and dv of every head of queries.

    Args:
        widths: of the text model; one without attention takes nothing.
        tokens: of the packed row.
        keys: that its sequences read, each as often as it is read.
        sequences: in the row.
        element: bytes of a number in the type computed in.
    """
    rows = tokens + 128 * sequences
    multiple = 32 if widths.head <= 128 else 64
    width = -(-widths.head // multiple) * multiple
    sums = rows * widths.heads * (width + 1) * _FLOAT32
    expanded = 2 * keys * widths.heads * widths.head * element if widths.groups < widths.heads else 0
    return sums + expanded


def head_tile(scored: int, element: int) -> int:
    """Bytes of the logits that the head's kernel holds at a time: of `scored` tokens, in a type of `element` bytes."""
    tokens, words = _TILE
    return min(tokens, scored) * words * element


def of_batch(config: PreTrainedConfig, batch: Batch, element: int) -> int:
    """Bytes of the larger of `flash_backward` and `head_tile`, which are never in use at once.

    Args:
        config: of the text model.
        element: bytes of a number in the type computed in.
    """
    if batch.plan is None:
        sequences, tokens = batch.input_ids.shape[0], batch.input_ids.numel()
        keys, scored = tokens, int((batch.labels != IGNORED_LABEL).sum())
    else:
        sequences, tokens = len(batch.plan.segments), batch.plan.n_tokens
        keys, scored = sum(each.k_length for each in batch.plan.segments), batch.plan.n_scored
    widths = Widths.of(config)
    attention = flash_backward(widths, tokens, keys, sequences, element) if widths else 0
    return max(attention, head_tile(scored, element))


def nccl_buffers(processes: int) -> int:
    """Bytes of the buffers of one communicator."""
    return _NCCL if processes > 1 else 0
