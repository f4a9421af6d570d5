"""Options that say which preference pairs are read and how."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

from tandem.data import select
from tandem.data.formats import FORMATS
from tandem.options.fields import REQUIRED, changed, opt
from tandem.options.model import TemplateOptions
from tandem.options.rules import Options

ALL, MISSING = "all", "missing"  # sources that --val_ratio holds out of

# Options that each source of a mixture has for itself
SOURCE_OPTIONS = (
    "dataset_name", "dataset_config", "dataset_revision", "dataset_train_split", "dataset_test_split", "data_format",
    "row_function", "prompt_key", "chosen_key", "rejected_key", "input_key", "system_key", "ignore_columns",
    "min_score_margin", "pair_strategy", "score_key", "completion_key", "text_key",
)  # fmt: skip


@dataclasses.dataclass
class DataOptions(Options):
    """Data."""

    dataset_name: str = opt(
        REQUIRED,
        "Hub name; or a .json, .jsonl, .csv (.gz too) or .parquet file, or a folder of them; or a .yaml mixture: a "
        "list of sources, each with dataset_name, weight and, where wanted, its own splits, format and keys; a weight "
        "over the sum of weights is the source's share of the training pairs, in the largest mixture that repeats no "
        "pair",
    )
    dataset_config: str | None = opt(None, "configuration of a Hub dataset")
    dataset_revision: str | None = opt(None, "branch, tag or commit of a Hub dataset")
    dataset_train_split: str = opt("train", "training split, with a slice if wanted: train[:5%]")
    dataset_test_split: str = opt(
        "test",
        "held-out split, with a slice if wanted",
        unless="val_ratio!=0, which holds pairs out instead",
    )
    val_ratio: float = opt(
        0.0, "hold out this share of the training split's prompts instead of reading a test split", low=0, below=1
    )
    val_ratio_of: str = opt(
        ALL,
        f"hold out of {ALL} sources, or of those that are {MISSING} a held-out split, beside the splits of the others",
        choices=(ALL, MISSING),
        needs="val_ratio!=0",
    )
    data_seed: int = opt(42, "seed of the --val_ratio split, of a mixture and of --pair_strategy best_random")
    data_format: str | None = opt(None, "force a format instead of detecting it", choices=FORMATS)
    row_function: str | None = opt(
        None,
        "function of your own, as module:function or file.py:function, that makes of each row one of a known format "
        "(docs/extending.md)",
    )
    prompt_key: str | None = opt(None, "column that holds the prompt")
    chosen_key: str | None = opt(None, "column that holds the preferred answer")
    rejected_key: str | None = opt(None, "column that holds the other answer")
    input_key: str | None = opt(None, "column whose text is put after the prompt's, as the alpaca format's input")
    system_key: str | None = opt(None, "column that holds a system message")
    ignore_columns: list[str] = opt(
        [], "columns to leave out, and with a dot before them keys of messages: context .weight"
    )
    min_score_margin: float | None = opt(
        None, "leave out pairs whose score_chosen less score_rejected is not above this", low=0
    )
    pair_strategy: str | None = opt(
        None,
        "of several rated or ranked answers to a prompt: the best against the worst (unset), the best against another "
        "at random, or all pairs",
        choices=select.STRATEGIES,
    )
    score_key: str | None = opt(None, "score of an answer among several; one with rank in its name is best at 1")
    max_bad_rows: int = opt(0, "skip and list up to this many rows that cannot be read", low=0)

    def conflicts(self) -> Iterator[str]:
        if self.chosen_key is not None and self.chosen_key == self.rejected_key:
            yield f"--chosen_key and --rejected_key both name {self.chosen_key}: no pair would prefer anything"
        if self.is_mixture:
            for name in changed(self):
                if name in SOURCE_OPTIONS[1:]:
                    yield f"--{name} has no effect with a mixture: give it to a source in {self.dataset_name}"
        elif self.data_seed != type(self).data_seed and not self.val_ratio and self.pair_strategy != select.BEST_RANDOM:
            yield "--data_seed has no effect without --val_ratio or a mixture"

    @property
    def is_mixture(self) -> bool:
        """Whether `dataset_name` is the YAML file of a mixture."""
        return self.dataset_name.endswith((".yaml", ".yml"))

    @property
    def keys(self) -> dict[str, str]:
        """Column mapping given by the `--*_key` options: a format's own name → the file's."""
        prompt_name = {"alpaca": "instruction", "orca": "question", "sharegpt": "conversations"}
        names = {
            prompt_name.get(self.data_format or "", "prompt"): self.prompt_key,
            "chosen": self.chosen_key,
            "rejected": self.rejected_key,
            "input": self.input_key,
            "system": self.system_key,
        }
        return {name: key for name, key in names.items() if key is not None}


@dataclasses.dataclass
class SFTDataOptions(DataOptions):
    """Data."""  # the heading of --help; with these, rows of one answer are read beside pairs (data.examples)

    completion_key: str | None = opt(None, "column that holds the answer to learn, where there is one answer a row")
    text_key: str | None = opt(None, "column of whole texts to learn, without a question")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.completion_key is not None and self.text_key is not None:
            yield "--completion_key and --text_key exclude each other: a row has an answer, or is a text"
        if self.text_key is not None and self.prompt_key is not None:
            yield "--prompt_key has no effect with --text_key: a text has no question"


# Findings about single pairs, which --fix drop_NAME takes out; data.lint.KINDS says what they are
DROPPABLE = (
    "identical", "duplicates", "near_duplicates", "contradictory", "leaked_prompts", "near_leaked_prompts",
    "repeated_prompts", "near_prompts", "answer_lost", "answer_cut", "difference_cut", "closed_twice",
    "system_cut", "prompt_cut", "several_turns", "turn_markers", "role_order", "prompt_repeated",
    "wrapped_prompt", "score_order", "missing_value", "unfinished", "single_token", "special_tokens",
    "identical_tokens", "boundary_merges", "not_text", "personal_data", "other_language",
)  # fmt: skip


@dataclasses.dataclass
class CheckOptions(TemplateOptions):
    """Check."""

    tokenizer_name_or_path: str | None = opt(
        None, "tokenizer (or model) that lengths are counted with; unset: not counted"
    )
    report: str | None = opt(None, "write data_report.json here")
    show: int = opt(0, "print the first N pairs of each split as they are trained, token by token", low=0)
    fail_on: str = opt(
        "error",
        "end with exit code 2 on a finding of this level or a worse one",
        choices=("error", "warning", "note", "none"),
    )
    fix: list[str] = opt(
        [], f"leave out the pairs that these findings are about: drop_ with any of {', '.join(DROPPABLE)}"
    )
    fixed_dir: str | None = opt(
        None, "new folder for the pairs that --fix leaves: train.jsonl, and test.jsonl if held out"
    )

    def __post_init__(self) -> None:
        self.fix = [name for item in self.fix for name in item.split(",") if name]
        super().__post_init__()

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        for name in self.fix:
            if name.removeprefix("drop_") not in DROPPABLE or not name.startswith("drop_"):
                near = difflib.get_close_matches(name, [f"drop_{kind}" for kind in DROPPABLE], n=1)
                yield f"--fix: unknown {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        if bool(self.fix) != (self.fixed_dir is not None):
            yield "--fix and --fixed_dir need each other: the mended data go to a new folder"
        if self.show and not self.tokenizer_name_or_path:
            yield "--show needs --tokenizer_name_or_path: tokens are of a tokenizer"
        if self.fixed_dir and Path(self.fixed_dir).exists():
            yield f"--fixed_dir {self.fixed_dir}: is there already, and nothing is overwritten; name another"

    @property
    def dropped(self) -> list[str]:
        """Names of the findings whose pairs are left out."""
        return [name.removeprefix("drop_") for name in self.fix]
