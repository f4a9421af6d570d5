"""Options that say which preference pairs are read and how."""

import dataclasses

from tandem.config import REQUIRED, opt
from tandem.data.formats import FORMATS
from tandem.errors import UserError


@dataclasses.dataclass
class DataOptions:
    """Data."""

    dataset_name: str = opt(
        REQUIRED, "Hub name, or a .json, .jsonl, .csv or .parquet file (.gz too), or a folder of them"
    )
    dataset_config: str | None = opt(None, "configuration of a Hub dataset")
    dataset_revision: str | None = opt(None, "branch, tag or commit of a Hub dataset")
    dataset_train_split: str = opt("train", "training split, with a slice if wanted: train[:5%]")
    dataset_test_split: str = opt("test", "held-out split, with a slice if wanted")
    val_ratio: float = opt(0.0, "hold out this share of the training split's prompts instead of reading a test split")
    data_seed: int = opt(42, "seed of the --val_ratio split")
    data_format: str | None = opt(None, "force a format instead of detecting it", choices=FORMATS)
    prompt_key: str | None = opt(None, "column that holds the prompt")
    chosen_key: str | None = opt(None, "column that holds the preferred answer")
    rejected_key: str | None = opt(None, "column that holds the other answer")
    input_key: str | None = opt(None, "column that holds the alpaca format's input")
    system_key: str | None = opt(None, "column that holds a system message")
    max_bad_rows: int = opt(0, "skip and list up to this many rows that cannot be read")

    def __post_init__(self) -> None:
        if not 0 <= self.val_ratio < 1:
            raise UserError(f"--val_ratio must be at least 0 and below 1, not {self.val_ratio}")
        if self.max_bad_rows < 0:
            raise UserError(f"--max_bad_rows must not be negative, got {self.max_bad_rows}")

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
