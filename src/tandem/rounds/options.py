"""Options of the stages of a round. Light to import."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tandem.answers.generate import GenerateOptions
from tandem.errors import UserError
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.rounds import select
from tandem.rounds.names import DATA, PAIRS, PAIRS_REPORT

Item = TypeVar("Item")


@dataclass
class SampleOptions(GenerateOptions):
    """Samples."""

    output_dir: str = opt(REQUIRED, "folder for samples.jsonl, prompts.jsonl and a draws_<label>.jsonl of each model")
    num_samples: int = opt(5, "answers of each model to a prompt", low=1)
    parts: int = opt(1, "deal the prompts to this many parts, so that each round has others", low=1)
    part: int = opt(1, "the part that is answered here, from 1", low=1)
    with_chosen: bool = opt(False, f"the data's preferred answers are candidates too, as those of {DATA}")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if DATA in self.by_label:
            yield f"--models: {DATA} is the label of the data's own answers; take another"
        if self.part > self.parts:
            yield f"--part must be from 1 to --parts {self.parts}, not {self.part}"

    def own_part(self, items: Sequence[Item]) -> list[Item]:
        """Every `parts`-th of `items`.

        Raises:
            UserError: there are fewer items than parts.
        """
        if len(items) < self.parts:
            raise UserError(f"--parts {self.parts}: there are only {len(items)} prompts to deal")
        return list(items[self.part - 1 :: self.parts])


@dataclass
class PairOptions(Options):
    """Pairs."""

    scores: str = opt(REQUIRED, "scores.jsonl of score.py; or lines with prompt, text and score")
    output_dir: str = opt(REQUIRED, f"folder for the pairs ({PAIRS}), {PAIRS_REPORT} and data_report.json")
    pair_strategy: str = opt(
        select.BEST_WORST,
        "of a prompt's answers: the best against the worst, the best against others at random, or all pairs",
        choices=select.STRATEGIES,
    )
    min_score_margin: float = opt(0.0, "score of chosen less that of rejected is above this", low=0, below=math.inf)
    max_pairs_per_prompt: int | None = opt(
        None,
        "most pairs of one prompt; unset: 1, and with all no limit",
        low=1,
        unless=f"pair_strategy={select.BEST_WORST}, which gives one",
    )
    max_length_ratio: float | None = opt(
        None,
        "neither answer is more than this many times as long as the other (tokens, or characters if not known)",
        low=1,
        below=math.inf,
    )
    keep_near_duplicates: bool = opt(False, "keep pairs whose answers are nearly the same, word for word")
    round: int = opt(1, "number of the round, for the pairs' provenance")
    pair_seed: int = opt(42, "seed of best_random", needs=f"pair_strategy={select.BEST_RANDOM}")
    fail_on: str = opt(
        "error",
        "end with exit code 2 where the data check finds this level or worse",
        choices=("error", "warning", "note", "none"),
    )

    @property
    def selection(self) -> select.Selection:
        """What these options ask for."""
        most = self.max_pairs_per_prompt or (2**31 if self.pair_strategy == select.ALL else 1)
        return select.Selection(self.pair_strategy, self.min_score_margin, most, self.max_length_ratio)
