"""Log-probabilities of pairs under a model, and samples from it, for evaluate, generate and compare."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from tandem import ranks
from tandem.data.tokenized import SIDES
from tandem.devices import fast_bf16, has_hpu
from tandem.engine.layout import IGNORED_LABEL
from tandem.engine.pairs import PairCollator, completion_logps, round_up
from tandem.errors import UserError
from tandem.models import habana
from tandem.models.decoding import decode, rows_that_fit, until_end
from tandem.models.draws import RowDraws
from tandem.models.ends import end_ids
from tandem.models.fits import check_head, check_rows, largest_id, positions_of
from tandem.models.load import load_model, load_tokenizer
from tandem.models.sampling import Sampling
from tandem.options.model import ModelOptions, TemplateOptions

TokenizedPair = dict[str, list[int]]

# Row lengths are multiples of this where each shape is compiled
_BUCKET = 128


def load_scorer(
    name: str,
    dtype: str,
    *,
    batch_size: int,
    bf16: bool | None = None,
    template: TemplateOptions | None = None,
) -> "Scorer":
    """The model or adapter `name`, its weights held as `dtype`, ready to score and sample."""
    habana.prepare()
    _release_memory()
    source = ModelOptions(model_name_or_path=name, dtype=dtype)
    return Scorer(
        load_model(source, sharded=ranks.is_sharded()),
        load_tokenizer(source, template),
        batch_size=batch_size,
        bf16=bf16,
    )


class Scorer:
    """A model ready to score and sample on the device at hand.

    On Gaudi, batches are filled up with copies, and rows to a multiple of `_BUCKET` tokens: a program is compiled for
    every shape. Elsewhere pairs go through the pair engine.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, bf16: bool | None = None
    ) -> None:
        self.device = _device()
        self.model = (model if ranks.is_sharded() else model.to(self.device)).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.bf16 = fast_bf16() if bf16 is None else bf16
        self.ends = end_ids(model.generation_config.eos_token_id, tokenizer)
        # A repetition penalty or other filter that comes with the model would change the distribution of its answers
        model.generation_config = type(model.generation_config)(eos_token_id=sorted(self.ends) or None)
        self.few_shapes = habana.few_shapes()
        if not self.few_shapes:
            from tandem.engine.forward import add_pair_forward

            add_pair_forward(model.get_base_model() if hasattr(model, "get_base_model") else model)

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
        multiple, size = (_BUCKET, self.batch_size) if self.few_shapes else (1, None)
        collate = PairCollator(self.tokenizer.pad_token_id, max_length, multiple=multiple, size=size)
        order = sorted(range(len(pairs)), key=lambda index: -_tokens(pairs[index]))  # what does not fit fails at once
        batches = list(_batches(order, self.batch_size))
        if ranks.is_sharded():  # the engine is probed once, and takes no rows that are longer than the first
            batches.reverse()

        def score(batch: list[int]) -> np.ndarray:
            logps = self._token_logps(collate([pairs[index] for index in batch])).sum(1).view(2, -1)
            values: np.ndarray = logps[:, : len(batch)].T.cpu().double().numpy()
            return values

        lengths = [len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]) for pair in pairs for side in SIDES]
        longest = max(lengths, default=0)
        check_head(self.model)
        self._check(
            [ids for pair in pairs for name, ids in pair.items() if name.endswith("_ids")],
            min(longest, max_length or longest),
            f"give --max_length {positions_of(self.model)} or less",
        )
        result = np.empty((len(pairs), 2))
        bar = tqdm(batches, desc=f"scoring {label}".strip(), leave=False, disable=not ranks.is_first())
        for batch, values in zip(bar, ranks.in_turns(batches, score), strict=True):
            result[batch] = values
        if not np.isfinite(result).all():
            raise UserError(
                f"{self.model.name_or_path}: its log-probabilities are not finite: its training diverged, or "
                "bfloat16 is too coarse for it"
            )
        return result

    def _check(self, rows: Sequence[list[int]], longest: int, remedy: str) -> None:
        check_rows(self.model, self.tokenizer, [largest_id(rows)], longest, remedy)

    def _token_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """(2B, S − 1) float32 nats, zero outside of completions."""
        ids, mask, completions = (
            batch[name].to(self.device) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        with self.autocast():
            if self.few_shapes:
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                return completion_logps(logits, ids, completions)
            labels = ids.masked_fill(completions == 0, IGNORED_LABEL)
            output = self.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
            log_probs: torch.Tensor = output.log_probs.float()
            return log_probs

    def rows_at_a_time(self, longest: int, new_tokens: int) -> int:
        """How many prompts of up to `longest` tokens the memory here allows to answer at a time."""
        if self.few_shapes:
            return self.batch_size
        return rows_that_fit(self.model, longest, new_tokens, self.device)

    def draw(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        """One answer of token ids to each prompt of one batch, its end-of-sequence token included if it came.

        Each is drawn with a seed of its own and, but for rounding, whatever the others are.
        """
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        self._check(prompts, longest, "give a smaller --max_prompt_length or --max_new_tokens")
        ids, mask = self._padded(prompts)
        draws = None
        if sampling.temperature > 0:
            width = None if habana.has_optimum_habana() else ids.shape[1]
            draws = RowDraws([*seeds, *[0] * (len(ids) - len(prompts))], sampling, width)
        if self.few_shapes:
            return self._generate_in_few_shapes(ids, mask, sampling, draws)[: len(prompts)]
        # Without autocast: it would convert every weight again for every token, since it caches none without gradients
        with torch.no_grad():
            return decode(
                self.model,
                ids,
                mask,
                max_new_tokens=sampling.max_new_tokens,
                pad=self.tokenizer.pad_token_id,
                draws=draws,
                rows_leave=not ranks.is_sharded(),
            )

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, (rows, columns); prompts stand at the right, and rows may be added."""
        rows, width = list(prompts), max(map(len, prompts))
        if self.few_shapes:
            rows += [rows[0]] * (-len(rows) % self.batch_size)
            width = round_up(width, _BUCKET)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in rows], device=self.device)
        return ids, mask

    @torch.no_grad()
    def _generate_in_few_shapes(
        self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, draws: Any | None
    ) -> list[list[int]]:
        """Keys and values have a fixed length. Optimum-habana's `generate` keeps to that by itself."""
        keywords: dict[str, Any] = {"cache_implementation": "static"}
        if habana.has_optimum_habana():
            keywords = {"lazy_mode": habana.is_lazy()}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            logits_processor=LogitsProcessorList([draws] if draws is not None else []),
            **keywords,
        )
        return [until_end(answer, self.ends) for answer in output[:, ids.shape[1] :].tolist()]


def _release_memory() -> None:
    """Free the former model, which is part of a reference cycle with its engine's forward, and give the memory that
    glibc's heap keeps of it back to the kernel."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _device() -> torch.device:
    if has_hpu():
        return torch.device("hpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _tokens(pair: TokenizedPair) -> int:
    return sum(map(len, pair.values()))


def _batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
