"""The logger of all stages, which writes to the screen and to `train.log` beside a run's outputs."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from tandem.credentials import hide

logger = logging.getLogger("tandem")
LOG_NAME = "train.log"


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


@contextlib.contextmanager
def logging_to(folder: str | Path) -> Iterator[None]:
    """Send log records to the screen and to `folder`/train.log until the block ends; only rank 0 calls this."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    formatter = _Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S")
    handlers = (logging.StreamHandler(), logging.FileHandler(Path(folder) / LOG_NAME, encoding="utf-8"))
    level, propagate = logger.level, logger.propagate
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.level, logger.propagate = level, propagate
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
