"""Scores by a reward model: a sequence classifier with one output, as transformers computes it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from tandem.data.formats import Message
from tandem.devices import fast_bf16, has_accelerator
from tandem.errors import UserError
from tandem.models.load import check_model, load_tokenizer
from tandem.options.model import ModelOptions

TOO_LONG, NOT_FINITE = "too_long", "not_finite"


class RewardModel:
    """A model that maps a conversation, which ends with an answer, to a number."""

    def __init__(self, name: str, dtype: str | None, batch_size: int) -> None:
        check_model(name)
        self.name = name
        self._batch_size = batch_size
        self._tokenizer = load_tokenizer(ModelOptions(model_name_or_path=name))
        held = dtype or ("bfloat16" if has_accelerator() and fast_bf16() else "float32")
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=getattr(torch, held), use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{name}: cannot be loaded as a reward model: {str(error).splitlines()[0]}") from error
        if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
            raise UserError(f"{name}: is no reward model: it lacks {missing[0]}")
        if model.config.num_labels != 1:
            raise UserError(f"{name}: has {model.config.num_labels} outputs; a reward model has one")
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self._model = model.to(device).eval()
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """The conversation as the model's own chat template renders it."""
        turns = [*messages, {"role": "assistant", "content": answer}]
        encoded: Any = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
        return list(encoded["input_ids"])

    def scores(self, texts: Sequence[tuple[Sequence[Message], str]]) -> Iterator[tuple[int, float | None, str]]:
        """For each of `texts` (prompt, answer) its index, and its score, or None and the reason; the longest first."""
        encoded = [self.ids(messages, answer) for messages, answer in texts]
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= self._longest]
        for index in sorted(set(range(len(texts))) - set(fitting)):
            yield index, None, TOO_LONG
        order = sorted(fitting, key=lambda index: -len(encoded[index]))  # if memory runs out, it does so at the start
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, value in zip(batch, self._forward([encoded[index] for index in batch]), strict=True):
                finite = value == value and abs(value) != float("inf")
                yield (index, value, "") if finite else (index, None, NOT_FINITE)

    @torch.no_grad()
    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        width, config = max(map(len, rows)), self._model.config.get_text_config()
        pad = config.pad_token_id
        if pad is None:
            # The model reads its value at the last token that is not padding: any token that is in no row will do
            used = {token for row in rows for token in row}
            pad = next(token for token in range(config.vocab_size) if token not in used)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self._model.device)
        before, config.pad_token_id = config.pad_token_id, pad
        try:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            config.pad_token_id = before
        values: list[float] = logits[:, 0].float().tolist()
        return values
