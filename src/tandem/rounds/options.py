"""Options of the stages of a round. Light to import."""

from dataclasses import dataclass

from tandem.errors import UserError
from tandem.options.parsing import REQUIRED, opt
from tandem.rounds import select

PAIRS, PAIRS_REPORT = "pairs.jsonl", "pairs_report.json"


@dataclass
class PairOptions:
    """Pairs."""

    scores: str = opt(REQUIRED, "scores.jsonl of score.py; or lines with prompt, text and score")
    output_dir: str = opt(REQUIRED, f"folder for the pairs ({PAIRS}), {PAIRS_REPORT} and data_report.json")
    pair_strategy: str = opt(
        select.BEST_WORST,
        "of a prompt's answers: the best against the worst, the best against others at random, or all pairs",
        choices=select.STRATEGIES,
    )
    min_score_margin: float = opt(0.0, "score of chosen less that of rejected is above this")
    max_pairs_per_prompt: int | None = opt(None, "most pairs of one prompt; unset: 1, and with all no limit")
    max_length_ratio: float | None = opt(
        None, "neither answer is more than this many times as long as the other (tokens, or characters if not known)"
    )
    keep_near_duplicates: bool = opt(False, "keep pairs whose answers are nearly the same, word for word")
    round: int = opt(1, "number of the round, for the pairs' provenance")
    pair_seed: int = opt(42, "seed of best_random")
    fail_on: str = opt(
        "error",
        "end with exit code 2 where the data check finds this level or worse",
        choices=("error", "warning", "note", "none"),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_score_margin < float("inf"):
            raise UserError(f"--min_score_margin must be a number of at least 0, not {self.min_score_margin}")
        if self.max_length_ratio is not None and not 1 <= self.max_length_ratio < float("inf"):
            raise UserError(f"--max_length_ratio must be at least 1, not {self.max_length_ratio}")
        if self.max_pairs_per_prompt is not None:
            if self.max_pairs_per_prompt < 1:
                raise UserError(f"--max_pairs_per_prompt must be at least 1, not {self.max_pairs_per_prompt}")
            if self.pair_strategy == select.BEST_WORST:
                raise UserError("--max_pairs_per_prompt has no effect with --pair_strategy best_worst: it gives one")
        if self.pair_seed != type(self).pair_seed and self.pair_strategy != select.BEST_RANDOM:
            raise UserError(f"--pair_seed has no effect with --pair_strategy {self.pair_strategy}")

    @property
    def selection(self) -> select.Selection:
        """What these options ask for."""
        most = self.max_pairs_per_prompt or (2**31 if self.pair_strategy == select.ALL else 1)
        return select.Selection(self.pair_strategy, self.min_score_margin, most, self.max_length_ratio)
