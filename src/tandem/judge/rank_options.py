"""Options of a ranking of several models. Nothing heavy is imported here."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.judge.options import JudgeOptions, label_of
from tandem.options.fields import REQUIRED, opt
from tandem.options.rules import Options
from tandem.runs import sha256_json
from tandem.servers.address import checked_url


def _judges(name: str) -> Any:
    """The option of this name of `JudgeOptions`, which here holds for each judge."""
    field = JudgeOptions.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


_SHARED = (
    "calibration_pairs",
    "max_flip_rate",
    "samples",
    "temperature",
    "max_output_tokens",
    "max_concurrency",
    "timeout",
    "max_attempts",
    "max_cost",
    "dry_run",
    "seed",
)


@dataclasses.dataclass
class RankOptions(Options):
    """Rank."""

    answers: list[str] = opt(
        REQUIRED, "files of answers to the same prompts, as label=FILE, or FILE where it is generations_<label>.jsonl"
    )
    judge_model: list[str] = opt(REQUIRED, "models that judge, as their servers name them")
    output_dir: str = opt(REQUIRED, "folder for ranking.json, ranking.html, and judges/ with every reply and verdict")
    base_url: list[str] | None = opt(
        None, "server of all judges, or of each in their order; unset: $OPENAI_BASE_URL, or OpenAI's own"
    )
    max_prompts: int | None = opt(None, "compare only on the first N prompts", low=1)
    calibration_pairs: int = _judges("calibration_pairs")
    max_flip_rate: float = _judges("max_flip_rate")
    samples: int = _judges("samples")
    temperature: float | None = _judges("temperature")
    max_output_tokens: int = _judges("max_output_tokens")
    max_concurrency: int = _judges("max_concurrency")
    timeout: float = _judges("timeout")
    max_attempts: int = _judges("max_attempts")
    price_in: list[float] | None = opt(
        None, "price of a million input tokens, of all judges or of each in their order", low=0
    )
    price_out: list[float] | None = opt(None, "price of a million output tokens, in the same way", low=0)
    max_cost: float | None = opt(
        None, "stop a judge before this much is spent on it; the same command with a higher one goes on", low=0
    )
    dry_run: bool = _judges("dry_run")
    seed: int = _judges("seed")

    def conflicts(self) -> Iterator[str]:
        labels = [label for label, _ in self.files]
        if len(labels) < 2:
            yield f"--answers {' '.join(self.answers)}: two files at least are needed"
        if len(set(labels)) < len(labels):
            yield f"--answers {' '.join(self.answers)}: a label is there twice: write label=FILE"
        for label, file in self.files:
            if not label or not str(file) or str(file) == ".":
                yield f"--answers {label}={file}: must be label=FILE"
        for name in ("base_url", "price_in", "price_out"):
            given = getattr(self, name) or [None]
            if len(given) not in (1, len(self.judge_model)):
                yield f"--{name}: {len(given)} of them for {len(self.judge_model)} judges; give one, or one each"
                return
        if len(set(self.judges)) < len(self.judges):
            yield f"--judge_model {' '.join(self.judge_model)}: a judge is there twice"
        for url in self.base_url or []:
            try:
                checked_url(url)
            except UserError as problem:
                yield str(problem)
        if (self.price_in is None) != (self.price_out is None):
            yield "--price_in and --price_out need each other"
        if self.max_cost is not None and self.price_in is None:
            yield "--max_cost needs --price_in and --price_out: the server does not tell its prices"

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Label and file of each model's answers."""
        found = []
        for given in self.answers:
            label, equals, file = given.partition("=")
            if not equals or "/" in label:
                label, file = label_of(Path(given)), given
            found.append((label, Path(file)))
        return found

    def _each(self, given: list[Any] | None) -> list[Any]:
        """A value for each judge, from one for all judges or one each."""
        values = given or [None]
        return values * len(self.judge_model) if len(values) == 1 else values

    @property
    def judges(self) -> list[tuple[str, str | None]]:
        """Model and server of each judge."""
        return list(zip(self.judge_model, self._each(self.base_url), strict=True))

    def of_judge(self, index: int) -> JudgeOptions:
        """The options of one judge, with a folder of its own for its verdicts."""
        model, url = self.judges[index]
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)[:60]}_{sha256_json([url, model])[:8]}"
        files = [str(file) for _, file in self.files]
        return JudgeOptions(
            judge_model=model,
            base_url=url,
            generations_a=files[0],
            generations_b=files[1],
            output_dir=str(Path(self.output_dir) / "judges" / name),
            self_pairs=0,
            label_pairs=0,
            price_in=self._each(self.price_in)[index],
            price_out=self._each(self.price_out)[index],
            **{option: getattr(self, option) for option in _SHARED},
        )
