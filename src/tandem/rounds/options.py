"""Options of the stages of a round. Nothing heavy is imported here."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tandem.answers.generate import GenerateOptions
from tandem.data import select
from tandem.errors import UserError
from tandem.options.fields import REQUIRED, changed, flags, opt
from tandem.options.rules import Options
from tandem.rounds.names import DATA, PAIRS, PAIRS_REPORT
from tandem.servers.address import checked_url

Item = TypeVar("Item")


@dataclass
class SampleOptions(GenerateOptions):
    """Samples."""

    output_dir: str = opt(REQUIRED, "folder for samples.jsonl, prompts.jsonl and a draws_<label>.jsonl of each model")
    num_samples: int = opt(5, "answers of each model to a prompt", low=1)
    parts: int = opt(1, "deal the prompts to this many parts, so that each round has others", low=1)
    part: int = opt(1, "the part that is answered here, from 1", low=1)
    held_out: bool = opt(False, "answer the held-out prompts instead, to measure a round; no pairs are made of them")
    with_chosen: bool = opt(False, f"the data's preferred answers are candidates too, as those of {DATA}")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if DATA in self.by_label:
            yield f"--models: {DATA} is the label of the data's own answers; take another"
        if self.part > self.parts:
            yield f"--part must be from 1 to --parts {self.parts}, not {self.part}"

    def own_part(self, items: Sequence[Item]) -> list[Item]:
        """The items of this `part`: every `parts`-th one.

        Raises:
            UserError: there are fewer items than parts.
        """
        if len(items) < self.parts:
            raise UserError(f"--parts {self.parts}: there are only {len(items)} prompts to deal")
        return list(items[self.part - 1 :: self.parts])


@dataclass
class ScoreOptions(Options):
    """Scores."""

    samples: str = opt(REQUIRED, "samples.jsonl of sample.py; or lines with prompt and text")
    output_dir: str = opt(REQUIRED, "folder for scores.jsonl, scores_report.json and scores_cache.jsonl")
    reward_models: list[str] = opt([], "score by these sequence classifiers with one output: folders or Hub names")
    reward_combine: str = opt(
        "mean",
        "of several reward models: the mean or least of their scores ranks; each: the first of them does, or --rank_by",
        choices=("mean", "min", "each"),
    )
    reward_batch_size: int = opt(8, "conversations in a batch of a reward model", low=1)
    reward_dtype: str | None = opt(
        None,
        "type of a reward model's weights; unset: bfloat16 on a GPU that multiplies it, else float32",
        choices=("float32", "bfloat16", "float16"),
    )
    score_function: list[str] = opt(
        [], "score by your own function(prompt, answer, row) -> float, as module:function or file.py:function"
    )
    judge_model: str | None = opt(None, "score by this judge, as the server at --judge_base_url names it")
    judge_base_url: str | None = opt(None, "the judge's server; unset: OpenAI's", needs="judge_model!=none")
    judge_mode: str = opt(
        "pairwise",
        "answers to a prompt are compared in both orders, or each is marked by a rubric",
        choices=("pairwise", "rubric"),
        needs="judge_model!=none",
    )
    judge_against: str | None = opt(
        None,
        "samples.jsonl of another model: each answer is compared, in both orders, with that one's to the same prompt: "
        "1 better, 0 worse, ½ neither",
        needs="judge_mode=pairwise",
    )
    rubric: str | None = opt(None, "text file that says how to mark an answer from 1 to 10", needs="judge_mode=rubric")
    judge_max_output_tokens: int = opt(2048, "longest reply of the judge", low=1, needs="judge_model!=none")
    judge_concurrency: int = opt(8, "requests to the judge at a time", low=1, needs="judge_model!=none")
    judge_temperature: float | None = opt(None, "sampling temperature of the judge", low=0, needs="judge_model!=none")
    rank_by: str | None = opt(
        None, "of several scorers, the one whose score ranks, as reward:NAME, function:NAME, judge:NAME"
    )

    def conflicts(self) -> Iterator[str]:
        names = self.scorers
        of_rewards = [name for name in changed(self) if name.startswith("reward_")]
        if of_rewards and not self.reward_models:
            yield f"{flags(of_rewards)} no effect without --reward_models"
        if not names:
            yield "nothing to score by: give --reward_models, --score_function or --judge_model"
        if (len({name.split(":")[0] for name in names}) > 1 or len(self.score_function) > 1) and self.rank_by is None:
            yield f"--rank_by is required with several scorers: one of {', '.join(names)}"
        if self.rank_by is not None and self.rank_by not in names:
            yield f"--rank_by {self.rank_by}: is none of {', '.join(names)}"
        for name in self.score_function:
            file = name.rpartition(":")[0]
            if file.endswith(".py") and not Path(file).is_file():
                yield f"--score_function {name}: no such file"
        if self.judge_against is not None and self.judge_model is None:
            yield "--judge_against has no effect without --judge_model"
        if self.rubric is not None and not Path(self.rubric).is_file():
            yield f"--rubric {self.rubric}: no such file"
        if self.judge_base_url is not None:
            try:
                checked_url(self.judge_base_url)
            except UserError as error:
                yield str(error).replace("--base_url", "--judge_base_url")
        for name in ("reward_models", "score_function"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                yield f"--{name} {' '.join(given)}: one is there twice"

    @property
    def scorers(self) -> list[str]:
        """The names of the scorers, in the order in which they are asked."""
        judges = [self.judge_model] if self.judge_model else []
        by_kind = {"reward": self.reward_models, "function": self.score_function, "judge": judges}
        return [f"{kind}:{name}" for kind, names in by_kind.items() for name in names]


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
        """How pairs are selected, by these options."""
        most = self.max_pairs_per_prompt or (2**31 if self.pair_strategy == select.ALL else 1)
        return select.Selection(self.pair_strategy, self.min_score_margin, most, self.max_length_ratio)


@dataclass
class RoundsOptions(Options):
    """Rounds."""

    run_dir: str = opt(REQUIRED, "folder of the rounds, with round_<r>/held_out/scores.jsonl in it")
    seed: int = opt(42, "seed of the bootstrap", low=0)
    non_answer_score: float | None = opt(
        None,
        "score of an answer that is none (empty, cut off), such as 0 where a score is success; unset: it has none, and "
        "its prompt is left out of differences",
        above=-math.inf,
        below=math.inf,
    )
    kl_prompts: int = opt(64, "held-out answers of a round on which its KL from round 0 is estimated; 0: none", low=0)
    kl_batch_size: int = opt(8, "batch size when these are scored", low=1, unless="kl_prompts=0")
