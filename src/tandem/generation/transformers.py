"""Answers drawn by transformers' `generate`, in batches of prompts of like length."""

from collections.abc import Collection, Iterator, Sequence

from tandem.data.formats import Message
from tandem.generation.engine import BATCH_SIZE, Answer, encode, read_answer, weights_dtype
from tandem.generation.options import GenerationOptions
from tandem.models import load_model, load_tokenizer
from tandem.options import ModelOptions
from tandem.sampling import SamplingOptions
from tandem.scoring import Scorer


class TransformersEngine:
    """An `Engine` that holds one model in this process."""

    def __init__(self, options: GenerationOptions, sampling: SamplingOptions) -> None:
        self._batch_size = options.batch_size or BATCH_SIZE
        self._dtype = weights_dtype(options)
        self._sampling = sampling
        self._scorer: Scorer | None = None

    def load(self, model: str) -> None:
        """See `Engine`."""
        self._scorer = None  # before the next one comes into memory
        source = ModelOptions(model_name_or_path=model, dtype=self._dtype)
        tokenizer = load_tokenizer(source)
        self._scorer = Scorer(load_model(source), tokenizer, batch_size=self._batch_size)

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """See `Engine`. Batches are fixed by `prompts`, and each has a seed of its own."""
        assert self._scorer is not None
        tokenizer, ends = self._scorer.tokenizer, self._scorer.ends
        ids = encode(prompts, tokenizer, self._sampling.max_prompt_length)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            if not set(batch).isdisjoint(wanted):
                drawn = self._scorer.sample(
                    [ids[index] for index in batch], self._sampling.sampling, self._sampling.seed + start
                )
                for index, answer in zip(batch, drawn, strict=True):
                    if index in wanted:
                        yield index, read_answer(answer, tokenizer, ends)

    def close(self) -> None:
        """See `Engine`."""
        self._scorer = None
