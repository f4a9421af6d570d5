"""One run of the judge in a process of its own, to be killed: `python -m tests.judge.judge_once URL FOLDER PAIRS`."""

import os
import sys

from openai import _base_client

from tandem.judge.backends import batch
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Comparison
from tandem.judge.run import judge
from tests.judge.fault_server import draw

FAULTY = {"max_concurrency": 16, "timeout": 1.0}  # options for a server that lets requests hang


def comparisons(count: int, label_1: str = "base", label_2: str = "dpo", share: float = 0.7) -> list[Comparison]:
    """Side 2 is the better one in `share` of the pairs, as far as `fault_server.fair` goes; some are identical."""
    pairs = []
    for index in range(count):
        better = draw("better", label_1, index) < share
        texts = [
            f"answer 1 {'x' * int(draw('one', index) * 40)}",
            f"answer {2 * better} {'y' * int(draw('two', index) * 40)}",
        ]
        if label_1 == "base" and index % 25 == 24:
            texts[1] = texts[0]
        messages = [{"role": "user", "content": f"Question {index} of {label_1}?"}]
        pairs.append(Comparison(f"{label_1}{index}", messages, *texts, label_1, label_2))
    return pairs


def labelled(count: int) -> list[Comparison]:
    """Pairs on which the fair judge is mostly right."""
    return comparisons(count, "rejected", "chosen", 0.9)


def options(url: str, folder: str, **more) -> JudgeOptions:
    """Options for a test server."""
    given = {"judge_model": "m", "base_url": url, "output_dir": folder, "timeout": 10.0, "self_pairs": 4}
    return JudgeOptions(**given | {"generations_a": "a", "generations_b": "b"} | more)


if __name__ == "__main__":
    url, folder, pairs = sys.argv[1:4]
    batch.BATCH_POLL = 0.05
    _base_client.INITIAL_RETRY_DELAY, _base_client.MAX_RETRY_DELAY = 0.005, 0.05
    batched = os.environ.get("JUDGE_BATCH") == "1"
    judge(options(url, folder, **FAULTY, batch=batched), comparisons(int(pairs)), labelled(int(pairs) // 8))
