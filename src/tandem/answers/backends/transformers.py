"""Answers drawn by transformers' `generate`, in batches of prompts of similar length."""

from collections.abc import Collection, Iterator, Sequence

from tandem import ranks
from tandem.answers.backends.base import BATCH_SIZE, Answer, Draw, encode, read_answer, weights_dtype
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.models.sampling import SamplingOptions, draw_seed
from tandem.models.scorer import Scorer, load_scorer


class TransformersBackend:
    """A `Backend` that holds one model in this process; the processes of a launch share the batches."""

    def __init__(self, options: GenerationOptions, sampling: SamplingOptions) -> None:
        self._batch_size = options.batch_size
        self._dtype = weights_dtype(options)
        self._sampling, self._template = sampling, options
        self._scorer: Scorer | None = None

    def load(self, model: str) -> None:
        """See `Backend`."""
        self._scorer = None  # free it before the next one is loaded
        self._scorer = load_scorer(
            model, self._dtype, batch_size=self._batch_size or BATCH_SIZE, template=self._template
        )

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """See `Backend`. An answer is a prompt's first draw."""
        for (index, _), answer in self.draws(prompts, 1, {(index, 0) for index in wanted}):
            yield index, answer

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """See `Backend`. Batches depend on `prompts` and `count` alone, so that `wanted` changes not even rounding."""
        assert self._scorer is not None
        scorer, sampling = self._scorer, self._sampling
        ids = encode(prompts, scorer.tokenizer, sampling.max_prompt_length)
        order = [(at, number) for at in sorted(range(len(ids)), key=lambda at: len(ids[at])) for number in range(count)]
        longest = max(map(len, ids), default=1)
        size = self._batch_size or scorer.rows_at_a_time(longest, sampling.max_new_tokens)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [batch for batch in batches if not set(batch).isdisjoint(wanted)]

        def draw(batch: list[Draw]) -> list[list[int]]:
            seeds = [draw_seed(sampling.seed, prompt_id(prompts[at]), number) for at, number in batch]
            return scorer.draw([ids[at] for at, _ in batch], sampling.sampling, seeds)

        for batch, drawn in zip(batches, ranks.in_turns(batches, draw), strict=True):
            for key, answer in zip(batch, drawn, strict=True):
                if key in wanted:
                    yield key, read_answer(answer, scorer.tokenizer, scorer.ends)

    def close(self) -> None:
        """See `Backend`."""
        self._scorer = None
