"""The one logger of the stages: to the screen, and to `train.log` beside the outputs."""

import logging
from pathlib import Path

from tandem.credentials import hide

logger = logging.getLogger("tandem")
LOG_NAME = "train.log"


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


def log_to(folder: str | Path) -> None:
    """Send this process's log records to the screen and to `folder`/train.log; only rank 0 calls this."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    formatter = _Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S")
    for handler in (logging.StreamHandler(), logging.FileHandler(Path(folder) / LOG_NAME, encoding="utf-8")):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
