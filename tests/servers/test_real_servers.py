"""Servers as people run them, each in an environment of its own: answers are drawn, and a judge is asked to the end.

The folder with a server's commands is named by an environment variable; without it the case is skipped. The tiny model
gives no verdicts, so that a judge's run ends after ten calls with the reason, which shows that it was understood.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.judge.asking import PILOT
from tandem.judge.run import judge
from tandem.runs import read_jsonl
from tests import tiny
from tests.judge.judge_once import comparisons, labelled, options

pytestmark = pytest.mark.slow
KEY = "sk-tandem-0123456789abcdef0123456789abcdef"
# name: the variable with the folder of its commands, None for this environment's, and the command
SERVERS = {
    "transformers": (None, "transformers serve {model} --host 127.0.0.1 --port {port}"),
    "vllm": ("TANDEM_VLLM_BIN", "vllm serve {model} --host 127.0.0.1 --port {port} --max-model-len 2048"),
    "litellm": (
        "TANDEM_LITELLM_BIN",
        "litellm --model openai/{model} --api_base {inner}/v1 --host 127.0.0.1 --port {port}",
    ),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path, line: str, port: int, log: Path) -> subprocess.Popen:
    program, *arguments = line.split()
    environment = os.environ | {"LITELLM_MASTER_KEY": KEY, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [folder / program, *arguments], env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT
    )
    for _ in range(300):
        if server.poll() is not None:
            pytest.skip(f"{program} does not start here: {log.read_text()[-300:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=2)
        except urllib.error.HTTPError:
            return server  # it has no such page, and speaks
        except OSError:
            time.sleep(1)
        else:
            return server
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module", params=SERVERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The server's address and the name of its model."""
    variable, line = SERVERS[request.param]
    folder = Path(sys.executable).parent if variable is None else Path(os.environ.get(variable, ""))
    if variable is not None and not os.environ.get(variable):
        pytest.skip(f"${variable} names no folder with {line.split()[0]}")
    work = tmp_path_factory.mktemp(request.param)
    model, started = tiny.save_model(work / "model"), []
    inner = ""
    try:
        if "{inner}" in line:
            port = free_port()
            command = SERVERS["transformers"][1].format(model=model, port=port)
            started.append(serve(Path(sys.executable).parent, command, port, work / "inner.log"))
            inner = f"http://127.0.0.1:{port}"
        port = free_port()
        command = line.format(model=model, port=port, inner=inner)
        started.append(serve(folder, command, port, work / "server.log"))
        yield f"http://127.0.0.1:{port}", f"openai/{model}" if inner else str(model)
    finally:
        for server in started:
            server.terminate()
            server.wait(30)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_answers_are_drawn(served, tmp_path, script, tiny_data):
    url, model = served
    line = f"--backend openai --base_url {url} --dataset_name {tiny_data} --max_prompts 3 --max_new_tokens 8"
    script("generate").main([*line.split(), "--models", f"m={model}", "--output_dir", str(tmp_path)])
    rows = read_jsonl(tmp_path / "generations_m.jsonl")
    assert len(rows) == 3 and {row["finish_reason"] for row in rows} <= {"stop", "length"}


def test_a_judge_is_understood_and_ends_after_ten_calls(served, tmp_path):
    url, model = served
    given = options(url, str(tmp_path / "judge"), judge_model=model, max_output_tokens=16, timeout=120.0)
    with pytest.raises(UserError, match=f"no verdict on any of the first {PILOT} calls; on .*(malformed|incomplete)"):
        judge(given, comparisons(5), labelled(8))
    assert len(read_jsonl(tmp_path / "judge" / "verdicts.jsonl")) == PILOT
