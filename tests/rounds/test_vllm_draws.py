"""What vLLM is asked for several draws. `tests/answers/backends/test_vllm.py` is about the real one."""

import importlib.machinery
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import prompt_id
from tandem.models.sampling import SamplingOptions, prompt_seed
from tests import tiny

PROMPTS = [[{"role": "user", "content": word}] for word in tiny.WORDS[:2]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Parameters of each request; a reply's tokens are those of its seed, as vLLM adds a draw's number to it."""
    modules = {
        name: MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
        for name in (
            "vllm", "vllm.inputs", "vllm.sampling_params", "vllm.lora.request", "vllm.usage.usage_lib",
            "vllm.engine.arg_utils", "vllm.v1.engine.async_llm", "vllm.v1.engine.exceptions",
        )
    }  # fmt: skip
    found: list[dict[str, Any]] = []

    async def generate(prompt: Any, parameters: dict[str, Any], key: str, lora_request: Any) -> Any:
        found.append(parameters | {"key": key})
        for number in range(parameters["n"]):
            tokens = tiny.tokenizer()(str(parameters["seed"] + number))["input_ids"]
            yield SimpleNamespace(outputs=[SimpleNamespace(index=number, token_ids=tokens)])

    modules["vllm"].SamplingParams = dict
    modules["vllm.v1.engine.exceptions"].EngineDeadError = RuntimeError
    modules["vllm.v1.engine.async_llm"].AsyncLLM.from_engine_args.return_value.generate = generate
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_a_prompt_is_asked_once_for_all_its_draws(asked: list[dict[str, Any]], tiny_model: Path):
    from tandem.answers.backends.vllm import VllmBackend

    engine = VllmBackend([str(tiny_model)], GenerationOptions(dtype="float32"), SamplingOptions(seed=7))
    engine.load(str(tiny_model))
    seeds = [prompt_seed(7, prompt_id(prompt)) for prompt in PROMPTS]
    drawn = dict(engine.draws(PROMPTS, 3, [(0, 0), (0, 1), (0, 2), (1, 2)]))
    assert {key: answer.text for key, answer in drawn.items()} == {
        (0, 0): str(seeds[0]), (0, 1): str(seeds[0] + 1), (0, 2): str(seeds[0] + 2), (1, 2): str(seeds[1] + 2),
    }  # fmt: skip
    assert sorted((request["n"], request["seed"]) for request in asked) == sorted([(3, seeds[0]), (1, seeds[1] + 2)])
    assert dict(engine.answers(PROMPTS, {1}))[1].text == str(seeds[1])
    engine._loop.close()
