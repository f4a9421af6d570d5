"""Log-probabilities of pairs under a model, and samples from it: what evaluate, generate and compare share."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tandem.engine.forward import add_pair_forward
from tandem.errors import UserError
from tandem.models import fast_bf16, has_accelerator
from tandem.sampling import Sampling

TokenizedPair = dict[str, list[int]]


class Scorer:
    """A model ready to score and sample on the device at hand."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, bf16: bool | None = None
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "evaluate, generate and compare run as one process: on several, each would do all of the work and "
                "write the same files"
            )
        self.device = (torch.accelerator.current_accelerator() if has_accelerator() else None) or torch.device("cpu")
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.bf16 = fast_bf16() if bf16 is None else bf16
        self.ends = end_ids(model.generation_config.eos_token_id, tokenizer)
        # A repetition penalty or other filter that the model ships would make its answers another distribution's
        model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends) or None)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        add_pair_forward(base)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 where the device multiplies it fast; sums of log-probs stay in float32."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def pair_logps(self, pairs: Sequence[TokenizedPair], max_length: int | None, label: str = "") -> np.ndarray:
        """(n, 2) float64: summed log-probs in nats of chosen and rejected, each given its prompt.

        Raises:
            UserError: one that is not finite: accuracies and margins made of them would mean nothing.
        """
        collate = DataCollatorForPreference(pad_token_id=self.tokenizer.pad_token_id, max_length=max_length)
        order = sorted(range(len(pairs)), key=lambda index: _tokens(pairs[index]))
        result = np.empty((len(pairs), 2))
        for batch in tqdm(list(_batches(order, self.batch_size)), desc=f"scoring {label}".strip(), leave=False):
            inputs = {key: value.to(self.device) for key, value in collate([pairs[i] for i in batch]).items()}
            mask = inputs.pop("completion_mask")
            labels = inputs["input_ids"].masked_fill(mask == 0, -100)
            with self.autocast():
                output = self.model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)
            result[batch] = output.log_probs.float().sum(1).view(2, -1).T.double().cpu().numpy()
        if not np.isfinite(result).all():
            raise UserError(
                f"{self.model.name_or_path}: its log-probabilities are not finite: its training diverged, or "
                "bfloat16 is too coarse for it"
            )
        return result

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """One answer of token ids to each prompt of one batch, its end-of-sequence token included if it came."""
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        # Without autocast: it would convert every weight again for every token, since it caches none without gradients
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=pad, use_cache=True, **sampling.keywords()
        )
        return [_until_end(answer, self.ends) for answer in output[:, width:].tolist()]


def _tokens(pair: TokenizedPair) -> int:
    return sum(map(len, pair.values()))


def _batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def end_ids(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in [*ends, tokenizer.eos_token_id] if end is not None}


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
