"""Options of the stages of a round. Light to import."""

import math
from dataclasses import dataclass

from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.rounds import select

PAIRS, PAIRS_REPORT = "pairs.jsonl", "pairs_report.json"


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
