"""Whether a model gives the same log-probs in both layouts: tried once on the model itself, and remembered.

What an architecture declares to support cannot be relied on. Some run without an error under another attention function
and explicit positions, yet read positions from the padding mask, carry a state along the row, or add a bias of their
own, and would score every pair wrongly. Scoring two short pairs in both layouts shows it.
"""

import contextlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import tandem
from tandem.engine.layout import IGNORED_LABEL, even_size
from tandem.runs import sha256_json, write_json

DEFAULT_CACHE = Path("~/.cache/tandem/probe")
# Longest sequence of a probe of short rows: longer than a small sliding window, and still only a second of work
_MAX_LENGTH = 160
_MIN_LENGTH = 48
# Tokens averaged over at a time, so that a fault at the end of long rows is not averaged away
_BLOCK = 64


def length_for(model: PreTrainedModel, longest: int) -> int:
    """Tokens of the probe's rows, for batches whose rows have up to `longest`.

    Windows and rotary embeddings may change at any length (Phi 3's LongRoPE, arXiv 2402.13753), so the rows of the
    probe are as long, up to the end of the model's positions: few lengths, since each is remembered by itself. Short
    ones reach past a small sliding window.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    short = min(max(_MIN_LENGTH, 2 * window), _MAX_LENGTH)
    if longest > short:
        step = max(16, 1 << max(0, longest.bit_length() - 3))
        short = -(-longest // step) * step
    return min(short, getattr(config, "max_position_embeddings", None) or short)


def probe_batch(model: PreTrainedModel, input_ids: Tensor, length: int) -> dict[str, Tensor]:
    """Two pairs of different lengths as TRL would collate them: `input_ids`, `attention_mask` and `labels`, (4, S).

    Args:
        length: S, see `length_for`.
        input_ids: a batch of any shape, int64. The pairs are drawn from its ids, less those the config names (padding,
            images), and live on its device.
    """
    # Completions of both rows differ in length, and pair 1 starts where a packed row has already gone on for a while
    prompts = (length // 2, length // 3)
    completions = ((length - length // 2, length // 4), (length // 5, length - length // 3))

    generator = torch.Generator().manual_seed(0)
    columns = torch.arange(length)
    prompt_length = torch.tensor(prompts * 2)[:, None]
    row_length = prompt_length + torch.tensor([pair[side] for side in (0, 1) for pair in completions])[:, None]
    vocabulary = _ordinary_ids(model.config, input_ids)
    ids = torch.randint(len(vocabulary), (4, length), generator=generator)
    ids[2:] = torch.where(columns < prompt_length[2:], ids[:2], ids[2:])
    real = columns < row_length
    input_ids = vocabulary[ids.to(vocabulary.device)]
    completion = (real & (columns >= prompt_length)).to(vocabulary.device)
    return {
        "input_ids": input_ids,
        "attention_mask": real.long().to(vocabulary.device),
        "labels": input_ids.masked_fill(~completion, IGNORED_LABEL),
    }


def _ordinary_ids(config: PreTrainedConfig, input_ids: Tensor) -> Tensor:
    named = config.to_dict() | config.get_text_config().to_dict()
    special = [value for name, value in named.items() if name.endswith("_token_id") and isinstance(value, int)]
    ids = input_ids.unique()
    ordinary = ids[~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))]
    return ordinary if len(ordinary) else ids


def difference(padded: Tensor, engine: Tensor, labels: Tensor) -> float:
    """Mean |difference| per scored token of two (4, S - 1) grids of log-probs, over max(1, mean |log p|).

    Of the means of each `_BLOCK` neighbouring tokens, the largest. Not a number where either path is not finite.
    """
    scored = labels[:, 1:] != IGNORED_LABEL
    reference = padded[scored].cpu().double()  # MPS has no float64
    gaps = (engine[scored].cpu().double() - reference).abs()
    gap = torch.stack([block.mean() for block in gaps.split(even_size(len(gaps), _BLOCK))]).max()
    return (gap / reference.abs().mean().clamp(min=1.0)).item()


class ProbeCache:
    """Differences measured before, one small JSON file a key, whole or absent."""

    def __init__(self, folder: str | Path = DEFAULT_CACHE) -> None:
        self.folder = Path(folder).expanduser()

    def key(self, model: PreTrainedModel, **setting: Any) -> str:
        """Hash of all that decides the outcome: architecture, library versions, and `setting`."""
        config = model.config.to_dict()
        for name in ("_name_or_path", "architectures", "transformers_version"):
            config.pop(name, None)
        versions = {name: version(name) for name in ("torch", "transformers", "trl")} | {"tandem": tandem.__version__}
        return sha256_json(
            {"model": type(model).__name__, "config": json.loads(json.dumps(config, default=str))}
            | {"versions": versions, "setting": setting}
        )

    def read(self, key: str) -> float | None:
        """The difference measured under `key`, or None. An unreadable file is none: it is written again."""
        try:
            return float(json.loads((self.folder / f"{key}.json").read_text())["difference"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, value: float) -> None:
        """Remember a finite difference; a folder that cannot be written costs a probe next time, and nothing else."""
        with contextlib.suppress(OSError):
            write_json(self.folder / f"{key}.json", {"difference": value})
