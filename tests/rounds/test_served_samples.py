"""Draws from a server: nothing lost, and after a kill no more paid twice than was in flight."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.answers.backends.options import GenerationOptions
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.rounds.options import SampleOptions
from tandem.rounds.prompts import Prompt
from tandem.rounds.records import read_records
from tandem.rounds.sample import sample
from tests.rounds.chat_server import ChatServer

ROOT = Path(__file__).parents[2]
CONCURRENCY = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def prompts(count: int) -> list[Prompt]:
    return [Prompt([{"role": "user", "content": f"question {index}"}], {}) for index in range(count)]


def drawn(server: ChatServer, folder: Path, count: int) -> list[dict[str, Any]]:
    options = SampleOptions(models=["policy=served"], output_dir=str(folder), num_samples=4)
    engine = GenerationOptions(backend="openai", base_url=server.url, batch_size=CONCURRENCY)
    return read_records(sample(options, engine, SamplingOptions(), prompts(count)))


def check(records: list[dict[str, Any]], count: int) -> None:
    assert len(records) == 4 * count
    for record in records:
        assert record["text"] == f"{record['messages'][0]['content']} drawn with {record['draw_seed']}"
    assert len({record["draw_seed"] for record in records}) == 4 * count


def test_faults_lose_nothing(tmp_path: Path):
    with ChatServer(share=0.3).serving() as server:
        check(drawn(server, tmp_path, 25), 25)
        assert sum(server.attempts.values()) > 120  # faults were met
        assert server.most_active <= CONCURRENCY
        assert set(server.paid.values()) == {1}


def test_a_prompt_that_the_server_refuses_is_that_prompts(tmp_path: Path):
    with ChatServer(refuses="question 3").serving() as server:
        records = drawn(server, tmp_path, 6)
    refused = [record["messages"][0]["content"] for record in records if record["finish_reason"] == "refused"]
    assert refused == ["question 3"] * 4
    assert all(record["text"] for record in records if record["finish_reason"] == "stop")


def test_a_server_that_refuses_everything_is_told(tmp_path: Path):
    with ChatServer(refuses="question").serving() as server:
        with pytest.raises(UserError, match="context length exceeded"):
            drawn(server, tmp_path, 30)
        assert sum(server.attempts.values()) <= 3 * CONCURRENCY


def run_killed(server: ChatServer, data: Path, folder: Path, kills: int, noise: random.Random) -> None:
    """Sample with the script, killed `kills` times at a random moment of what is left."""
    line = f"--models policy=served --dataset_name {data} --output_dir {folder} --num_samples 4 --backend openai"
    command = [sys.executable, str(ROOT / "scripts" / "sample.py"), *line.split(), "--base_url", server.url]
    command += ["--batch_size", str(CONCURRENCY)]
    for kill in range(kills + 1):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if kill == kills:
            assert process.wait(timeout=300) == 0
            return
        before = sum(server.paid.values())
        wanted = before + noise.randrange(5, 40)
        while sum(server.paid.values()) < wanted and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("count", "kills", "share"),
    [(30, 1, 0.0), pytest.param(1000, 20, 0.3, marks=pytest.mark.slow)],
    ids=["fast", "slow"],
)
def test_kills_pay_for_no_more_than_was_in_flight(tmp_path: Path, count: int, kills: int, share: float):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"question {index}"}) + "\n" for index in range(count)))
    with ChatServer(share=share, wait=0.01).serving() as server:
        run_killed(server, data, tmp_path / "out", kills, random.Random(7))
        check(read_records(tmp_path / "out" / "samples.jsonl"), count)
        assert len(server.paid) == 4 * count
        twice = sum(times - 1 for times in server.paid.values())
        assert twice <= kills * CONCURRENCY
        print(f"{sum(server.attempts.values())} requests, {twice} paid twice over {kills} kills")
        assert collections.Counter(server.paid.values())[1] >= 4 * count - kills * CONCURRENCY
