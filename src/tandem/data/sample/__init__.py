"""The project's own sample preference set, so that a first run needs no download.

HH transcripts in two files, `train.jsonl` and `test.jsonl`, written by `python -m tandem.data.sample.generate`.
"""

from importlib.resources import files
from pathlib import Path

SPLITS = ("train", "test")


def sample_path(split: str) -> Path:
    """Path of the JSON lines file of `split`, "train" or "test". Raises ValueError for any other name."""
    if split not in SPLITS:
        raise ValueError(f"the sample set has the splits {' and '.join(SPLITS)}, not {split!r}")
    return Path(str(files(__name__) / f"{split}.jsonl"))
