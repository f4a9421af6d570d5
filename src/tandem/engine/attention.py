"""Attention over the packed row of a `PairLayout`, plugged into transformers through its attention registry.

A model whose attention implementation was switched to `tandem|<original>` (see `switch_implementation`) runs
`PairAttention` where the caller passes one as the forward keyword `pair_attention`, and exactly its original
implementation everywhere else. Generation, evaluation and saving are untouched, and gradient checkpointing recomputes
with the keyword it was given, whatever runs in between.

Backends:
    varlen  one fused variable-length call a layer, on CUDA in half precision: flash-attn's where it can be imported,
            else `torch.nn.attention.varlen.varlen_attn` (see `kernels`)
    sdpa    a loop over the sequences with `scaled_dot_product_attention`: CPU, MPS, float32, dropout
    dense   a loop with plain matrix products: what no fused kernel here computes (soft-capping, attention sinks)
"""

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from tandem.engine import kernels
from tandem.engine.layout import PairLayout, Segment, even_size

Backend = Literal["auto", "varlen", "sdpa", "dense"]
PAIR_ATTENTION = "pair_attention"
_PREFIX = "tandem|"
# Queries per call on the CPU. Its kernel computes whole blocks of 512 keys, even where the causal mask hides them.
# Measured at 256 to 1024 tokens, forward and backward: 10 to 30% faster than one call; shorter rows, no difference.
CPU_QUERY_BLOCK = 128

logger = logging.getLogger("tandem.engine")


class UnsupportedAttention(Exception):
    """A layer asks for something the packed row cannot express, such as a position bias."""


@dataclass(frozen=True)
class AttentionRule:
    """How a layer's queries score its keys.

    Attributes:
        scale: factor of the scores; D ** -0.5 when None.
        window: a query sees its `window` latest keys, itself included; all of them when None.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax (Gemma 2, arXiv 2408.00118).
        sinks: (H,) logit per head that takes part in the softmax and has no value (gpt-oss).
        dropout: probability of dropping an attention weight.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0


class PairAttention:
    """The attention of one forward over one layout. Holds the masks its layers share.

    Args:
        places: where the sequences are.
        backend: forces one backend for every layer; `auto` takes the fastest that serves the layer.
    """

    def __init__(self, places: PairLayout, backend: Backend = "auto") -> None:
        self.places = places
        self.backend = backend
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **rule: Any) -> Tensor:
        """Attend every sequence of the layout to itself and its prefix, causally.

        Args:
            query: (1, H, T, D).
            key, value: (1, H_kv, T, D), H a multiple of H_kv. The value's D may differ.
            rule: attributes of `AttentionRule`.

        Returns:
            (1, T, H, D_value) in the dtype attended in, which under autocast is autocast's.

        Raises:
            UnsupportedAttention: a forced backend cannot compute this.
        """
        asked = AttentionRule(**rule)
        device = query.device.type
        # Tensors without values have no autocast, and asking for it is an error
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
        # Rotary embedding leaves float32 queries beside half-precision values under autocast, and not every backend
        # below is one that autocast knows
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        window = None if asked.window is not None and asked.window >= self.places.max_k else asked.window
        scale = query.shape[-1] ** -0.5 if asked.scale is None else asked.scale
        asked = replace(asked, scale=scale, window=window)

        backend = self.backend
        if backend == "auto":
            backend = choose_backend(query, value, asked)
        if backend == "varlen":
            if asked.sinks is not None:
                raise UnsupportedAttention("the varlen backend has no attention sinks")
            return self._varlen(query, key, value, asked)
        if backend == "sdpa":
            if asked.softcap is not None or asked.sinks is not None:
                raise UnsupportedAttention("the sdpa backend has neither soft-capping nor attention sinks")
            return self._each_segment(partial(sdpa, rule=asked), query, key, value, window)
        return self._each_segment(partial(_dense, rule=asked), query, key, value, window)

    def _each_segment(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> Tensor:
        segments = self.places.segments
        block = CPU_QUERY_BLOCK if query.device.type == "cpu" else self.places.max_q
        outputs = []
        for segment, own_query, keys, values in zip(
            segments, _split(query, segments), _keys(key, segments), _keys(value, segments), strict=True
        ):
            seen = segment.k_length - segment.q_length
            for queries in _even_blocks(own_query, block):
                seen += queries.shape[2]
                mask = self._mask(queries.shape[2], seen, window, query.device)
                outputs.append(attend(queries, _first(keys, seen), _first(values, seen), mask=mask))
        # One concatenation in the layout the projection reads, instead of one here and a transposed copy after it
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)

    def _mask(self, q_length: int, k_length: int, window: int | None, device: torch.device) -> Tensor | None:
        """(q, k) bool, True where query i may see key j: bottom-right aligned, `0 <= i + k - q - j < window`.

        None for the plain triangle, for which sdpa needs no mask. With this alignment a mask is the lower right corner
        of every larger one. On the CPU, whose blocks of queries are bounded, all are views of one, and memory grows
        with the longest sequence, not with its square.
        """
        if q_length == k_length and (window is None or window >= k_length):
            return None
        if device.type == "cpu":
            rows, columns = min(CPU_QUERY_BLOCK, self.places.max_q), self.places.max_k
            return self._whole_mask(rows, columns, window, device)[rows - q_length :, columns - k_length :]
        return self._whole_mask(q_length, k_length, window, device)

    def _whole_mask(self, q_length: int, k_length: int, window: int | None, device: torch.device) -> Tensor:
        size = (q_length, k_length, window)
        if size not in self._masks:
            visible = torch.ones(q_length, k_length, dtype=torch.bool, device=device).tril_(k_length - q_length)
            self._masks[size] = visible if window is None else visible.triu_(k_length - q_length - window + 1)
        return self._masks[size]

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        places, device = self.places, query.device
        key_index = places.key_index.to(device)
        # Both kernels align bottom-right where queries are fewer than keys, as flash-attn does since 2.1. A left window
        # of w - 1 keys and the query's own make a window of w.
        arguments = (
            query[0].transpose(0, 1),
            key[0].index_select(1, key_index).transpose(0, 1),
            value[0].index_select(1, key_index).transpose(0, 1),
            places.cu_seq_q.to(device),
            places.cu_seq_k.to(device),
            places.max_q,
            places.max_k,
        )
        window_size = (-1 if rule.window is None else rule.window - 1, 0)
        flash_attn = kernels.flash_attn_varlen()
        if flash_attn is not None:
            output = flash_attn(
                *arguments,
                dropout_p=rule.dropout,
                softmax_scale=rule.scale,
                causal=True,
                window_size=window_size,
                softcap=rule.softcap or 0.0,
                **({"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}),
            )
            return output[None]
        if rule.softcap is not None or rule.dropout:
            raise UnsupportedAttention("torch's varlen kernel has neither soft-capping nor dropout; install flash-attn")
        grouped = query.shape[1] != key.shape[1]
        return kernels.torch_varlen(*arguments, scale=rule.scale, window_size=window_size, grouped=grouped)[None]


def choose_backend(query: Tensor, value: Tensor, rule: AttentionRule) -> Backend:
    loop: Backend = "dense" if rule.softcap is not None or rule.sinks is not None else "sdpa"
    if not query.is_cuda:
        return loop
    dims = (query.shape[-1], value.shape[-1])
    reason = kernels.without_flash(query.device, query.dtype, dims, dropout=rule.dropout > 0)
    if rule.sinks is not None:
        reason = reason or "it has attention sinks"
    if (rule.softcap is not None or rule.dropout > 0) and kernels.flash_attn_varlen() is None:
        reason = reason or "soft-capping and dropout need the package flash-attn"
    if not reason:
        return "varlen"
    if query.dtype != torch.float32:  # which no flash kernel has
        say_once(f"attention goes sequence by sequence, because {reason}")
    return loop


@functools.cache
def say_once(line: str) -> None:
    """Warn of `line`, once in a process."""
    logger.warning("%s", line)


def _even_blocks(states: Tensor, limit: int) -> tuple[Tensor, ...]:
    """Consecutive tokens, at most `limit` in a block."""
    tokens = states.shape[2]
    return states.split(even_size(tokens, limit), dim=2) if tokens > limit else (states,)


def _first(states: Tensor, length: int) -> Tensor:
    """The first `length` keys or values. Where that is all of them it is no slice, whose backward would copy."""
    return states if length == states.shape[2] else states[:, :, :length]


def _split(states: Tensor, segments: tuple[Segment, ...]) -> tuple[Tensor, ...]:
    """The own tokens of every segment. One split, whose backward is one concatenation: the backward of a slice fills
    and adds a tensor as long as the whole row."""
    return states.split([segment.q_length for segment in segments], dim=2)


def _keys(states: Tensor, segments: tuple[Segment, ...]) -> list[Tensor]:
    """The keys or values of every segment: its prefix, which begins an earlier segment, and its own tokens."""
    pieces = {segment.start: piece for segment, piece in zip(segments, _split(states, segments), strict=True)}
    return [
        pieces[segment.start]
        if segment.q_length == segment.k_length
        else torch.cat(
            [pieces[segment.prefix_start][:, :, : segment.k_length - segment.q_length], pieces[segment.start]], dim=2
        )
        for segment in segments
    ]


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """(1, H, q, D) queries over (1, H_kv, k, D) keys; causal where there is no mask."""
    gqa = query.shape[1] != key.shape[1]
    dims = (query.shape[-1], value.shape[-1])
    if gqa and not kernels.sdpa_groups_heads(query.device, query.dtype, dims, masked=mask is not None):
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=mask is None,
        scale=rule.scale,
        enable_gqa=gqa,
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, rule: AttentionRule) -> Tensor:
    """The same as `sdpa` with soft-capping and sinks, softmax in float32; quadratic in memory."""
    assert rule.scale is not None
    _, heads, q_length, _ = query.shape
    kv_heads, k_length = key.shape[1:3]
    grouped = query.reshape(1, kv_heads, heads // kv_heads, q_length, -1)
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None:
        mask = torch.ones(q_length, k_length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if rule.sinks is not None:
        column = rule.sinks.float().view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :k_length].to(query.dtype)
    weights = F.dropout(weights, rule.dropout)
    return (weights @ value[:, :, None]).view(1, heads, q_length, -1)


def switch_implementation(config: PreTrainedConfig) -> None:
    """Have the modules that read `config` use a `PairAttention` where the forward brings one, and otherwise what they
    used before."""
    original = config._attn_implementation
    if original is None or original.startswith(_PREFIX):
        return
    name = _PREFIX + original
    AttentionInterface.register(name, partial(_attention_forward, original))
    masks = AttentionMaskInterface()
    if original in masks:
        AttentionMaskInterface.register(name, masks[original])
    config._attn_implementation = name


def restore_implementation(config: PreTrainedConfig) -> None:
    """Undo `switch_implementation`."""
    if config._attn_implementation is not None:
        config._attn_implementation = config._attn_implementation.removeprefix(_PREFIX)


def original_implementation(name: str) -> str:
    """The attention implementation that a config had before `switch_implementation`."""
    return name.removeprefix(_PREFIX)


def _attention_forward(
    original: str,
    module: nn.Module,
    *tensors: Tensor | None,
    pair_attention: PairAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls in every attention layer.

    Args:
        tensors: query, key and value, with shapes as in `PairAttention.__call__`, and the mask.
    """
    if pair_attention is None:
        return _original_forward(original, module, *tensors, **kwargs)
    query, key, value, *others = tensors
    if len(others) > 1:
        raise UnsupportedAttention(f"{type(module).__name__} passes attention arguments by position")
    assert query is not None and key is not None and value is not None
    if kwargs.get("position_bias") is not None:
        raise UnsupportedAttention(f"{type(module).__name__} adds a position bias to its scores")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttention(f"{type(module).__name__} is not causal")
    output = pair_attention(
        query,
        key,
        value,
        scale=kwargs.get("scaling"),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout", 0.0),
    )
    return output, None


def _original_forward(original: str, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    function = eager_function(module) if original == "eager" else AttentionInterface()[original]
    if function is None:
        raise UnsupportedAttention(f"no eager attention function beside {type(module).__name__}")
    # flash attention reads the name of its own kernel from the config
    switched = module.config._attn_implementation
    module.config._attn_implementation = original
    try:
        return function(module, *args, **kwargs)
    finally:
        module.config._attn_implementation = switched


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The `eager_attention_forward` of the file that defines the module's class: eager is not in the registry."""
    for cls in type(module).__mro__:  # FSDP2 puts a class of its own in front
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    return None
