"""Options of the judge. Nothing heavy is imported here, so that a wrong command line is answered at once."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from tandem.errors import UserError
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.servers.address import OPENAI_URL, checked_url, default_url


def label_of(file: Path) -> str:
    """What stands after `generations_` in a file's name, dots within it too: v2.1 of generations_v2.1.jsonl."""
    return re.sub(r"\.(?:jsonl?|ndjson|csv|parquet)(?:\.gz)?$", "", file.name).removeprefix("generations_")


@dataclasses.dataclass
class JudgeOptions(Options):
    """Judge."""

    judge_model: str = opt(REQUIRED, "model that judges, as the server at --base_url names it")
    base_url: str | None = opt(
        None,
        "server with the Responses API or chat completions; its key, if any, is read from $OPENAI_API_KEY; unset: "
        "$OPENAI_BASE_URL, or OpenAI's own",
    )
    judge_backend: str | None = opt(
        None,
        "what is asked instead of a server: a class of your own, as module:class or file.py:class (docs/extending.md)",
        unless="batch",
    )
    run_dir: str | None = opt(None, "run folder that holds generations_*.jsonl")
    policy: str = opt(
        "dpo", "in --run_dir: the model to be judged, as generations_<policy>.jsonl", needs="run_dir!=none"
    )
    against: str = opt(
        "base",
        "in --run_dir: the same of the other side; chosen: the answers that the data prefers",
        needs="run_dir!=none",
    )
    generations_a: str | None = opt(None, "instead of --run_dir: answers of the model judged against")
    generations_b: str | None = opt(None, "instead of --run_dir: answers of the model to be judged")
    output_dir: str | None = opt(
        None, "folder of replies and verdicts, with <its name>_summary.json beside it; unset: judge/ beside the answers"
    )
    calibration_pairs: int = opt(
        100, "held-out, human-labelled pairs that the judge is tested on first; 0: no winner is named", low=0
    )
    self_pairs: int = opt(10, "answers judged against themselves, to show a preference for a position", low=0)
    label_pairs: int = opt(
        100, "compared pairs that label.html, in the judge's folder, asks people about, blind; 0: no page", low=0
    )
    human_labels: str | None = opt(
        None, "file that label.html saved: people's labels, by which the score is corrected for the judge's errors"
    )
    max_flip_rate: float = opt(
        0.4, "name no winner if the judge changes sides with the order more often than this", low=0, high=1
    )
    samples: int = opt(1, "verdicts per order, averaged", low=1)
    temperature: float | None = opt(None, "sampling temperature of the judge; unset: the server's own", low=0)
    max_output_tokens: int = opt(2048, "longest reply of the judge, its reasoning included", low=1)
    max_concurrency: int = opt(8, "requests at a time; a 429 halves it for a while", low=1)
    timeout: float = opt(300.0, "seconds without an answer before a request is given up", above=0)
    max_attempts: int = opt(6, "tries for each verdict: failed requests, and replies that are no verdict", low=1)
    price_in: float | None = opt(None, "price of a million input tokens, in your currency", low=0)
    price_out: float | None = opt(None, "price of a million output tokens", low=0)
    max_cost: float | None = opt(
        None, "stop before this much is spent; the same command with a higher one goes on", low=0
    )
    dry_run: bool = opt(False, "count requests, tokens and cost; ask nothing, write nothing")
    batch: bool = opt(False, "use OpenAI's Batch API: cheaper, up to a day, the same command goes on waiting")
    seed: int = opt(42, "seed of the choice of calibration pairs and of the bootstrap", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base_url = checked_url(self._given_url)

    def conflicts(self) -> Iterator[str]:
        if (self.price_in is None) != (self.price_out is None):
            yield "--price_in and --price_out need each other"
        if self.max_cost is not None and self.price_in is None:
            yield "--max_cost needs --price_in and --price_out: the server does not tell its prices"
        try:
            checked_url(self._given_url)
        except UserError as problem:
            yield str(problem)
        if (self.generations_a is None) != (self.generations_b is None):
            yield "--generations_a and --generations_b need each other"
        if (self.run_dir is None) == (self.generations_a is None):
            yield "--run_dir, or --generations_a and --generations_b, is required: the answers to judge"
        if self.human_labels is not None and not Path(self.human_labels).is_file():
            yield f"--human_labels {self.human_labels}: no such file; label.html in the judge's folder saves one"
        if self.run_dir is not None and self.policy == self.against:
            yield f"--policy and --against are both {self.policy}: nothing to compare"

    @property
    def _given_url(self) -> str:
        return self.base_url or default_url() or OPENAI_URL

    @property
    def url(self) -> str:
        """The server's address, as `checked_url` gives it; the name of the backend, if it is the user's own."""
        assert self.base_url is not None
        return self.judge_backend or self.base_url

    @property
    def generation_files(self) -> tuple[Path, Path]:
        """The files of side 1, which is judged against, and of side 2, which is judged."""
        if self.run_dir is None:
            return Path(str(self.generations_a)), Path(str(self.generations_b))
        folder = Path(self.run_dir)
        return folder / f"generations_{self.against}.jsonl", folder / f"generations_{self.policy}.jsonl"

    @property
    def folder(self) -> Path:
        """Folder of raw.jsonl and verdicts.jsonl."""
        return Path(self.output_dir) if self.output_dir else self.generation_files[1].parent / "judge"

    @property
    def summary_file(self) -> Path:
        """The file of the summary, beside the judge's folder: judge_summary.json for judge/."""
        folder = self.folder.absolute()
        return folder.with_name(f"{folder.name}_summary.json")

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """The price of so many tokens, in the currency of the prices; None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (input_tokens * self.price_in + output_tokens * self.price_out) / 1e6
