import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tandem.models.scorer
from tandem.answers.backends.options import GenerationOptions
from tandem.answers.backends.transformers import TransformersBackend
from tandem.answers.generate import GenerateOptions
from tandem.answers.generate import generate as generate_all
from tandem.data.formats import prompt_id
from tandem.data.held_out import chosen_answers, held_out_prompts
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, prompt_seed
from tandem.runs import locked, read_jsonl
from tests import tiny

ROOT = Path(__file__).parents[2]


def options(**changes: Any) -> SamplingOptions:
    return SamplingOptions(**{"max_new_tokens": 12} | changes)


def generate(model: str, label: str, prompts: Any, sampling: SamplingOptions, folder: Path) -> Path:
    engine = GenerationOptions(batch_size=3)
    return generate_all({label: model}, prompts, sampling, engine, folder)[label]


PROMPTS = [[{"role": "user", "content": f"say {word} {index}"}] for index, word in enumerate(tiny.WORDS[:10])]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[dict[str, Any]]:
    return read_jsonl(generate(str(tiny_model), "dpo", PROMPTS, options(), tmp_path_factory.mktemp("answers")))


def by_prompt(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["prompt_id"]: record["text"] for record in records}


def test_a_line_a_prompt(undisturbed: list[dict[str, Any]], tiny_model: Path):
    assert by_prompt(undisturbed).keys() == {prompt_id(messages) for messages in PROMPTS}
    assert len(undisturbed) == len(PROMPTS)
    record = undisturbed[0]
    assert record["messages"] in PROMPTS
    assert (record["model"], record["adapter"], record["engine"]) == (str(tiny_model), None, "transformers")
    assert list(record) == [
        "prompt_id", "messages", "model", "adapter", "weights", "engine", "base_url", "dtype", "sampling",
        "seed", "text", "n_tokens", "finish_reason",
    ]  # fmt: skip
    draw = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.95, "max_prompt_length": 512}
    assert record["sampling"] == draw
    assert record["seed"] == 42
    assert all(record["finish_reason"] == ("stop" if record["n_tokens"] < 12 else "length") for record in undisturbed)


@pytest.mark.parametrize("kept", [1, 4, 9])
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]], kept: int, monkeypatch: pytest.MonkeyPatch
):
    """What is there stays byte for byte; only batches with something missing are drawn, and as they were drawn."""
    path = tmp_path / "generations_dpo.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in undisturbed]
    before = "".join(lines[:kept]) + lines[kept][:20]  # and a torn line
    path.write_text(before)
    drawn = []
    draw = tandem.models.scorer.Scorer.draw

    def counting(self: Any, prompts: Any, sampling: Any, seeds: Any) -> Any:
        drawn.append(len(prompts))
        return draw(self, prompts, sampling, seeds)

    monkeypatch.setattr(tandem.models.scorer.Scorer, "draw", counting)
    generate(str(tiny_model), "dpo", PROMPTS, options(), tmp_path)
    assert path.read_text().startswith("".join(lines[:kept]))
    assert read_jsonl(path) == undisturbed
    assert drawn == [min(3, 10 - start) for start in range(0, 10, 3) if start + 3 > kept]


def test_kill_and_go_on(tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]]):
    """kill -9 in a real process after the first answers."""
    path = tmp_path / "generations_dpo.jsonl"
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import pathlib, time, tandem.answers.generate as g\n"
        "from tests.answers.test_generate import PROMPTS, generate, options\n"
        "append = g.append_jsonl\n"
        "def slow(*a):\n    append(*a)\n    time.sleep(0.3)\n"
        "g.append_jsonl = slow\n"
        "generate(sys.argv[1], 'dpo', PROMPTS, options(), pathlib.Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tiny_model), str(tmp_path)], env=os.environ)
    while len(read_jsonl(path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = read_jsonl(path)
    assert 2 <= len(written) < len(PROMPTS)
    generate(str(tiny_model), "dpo", PROMPTS, options(), tmp_path)
    assert read_jsonl(path)[: len(written)] == written
    assert read_jsonl(path) == undisturbed


def test_a_finished_run_loads_no_model(tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]]):
    path = tmp_path / "generations_dpo.jsonl"
    gone = "/no/such/model"
    path.write_text("".join(json.dumps(record | {"model": gone}) + "\n" for record in undisturbed))
    assert generate(gone, "dpo", PROMPTS, options(), tmp_path) == path


@pytest.mark.parametrize(
    "change", [{"temperature": 0.5}, {"seed": 1}, {"greedy": True}, {"max_new_tokens": 5}, {"max_prompt_length": 5}]
)
def test_answers_of_other_settings_are_not_mixed(
    tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]], change: dict[str, Any]
):
    path = tmp_path / "generations_dpo.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in undisturbed))
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        generate(str(tiny_model), "dpo", PROMPTS, options(**change), tmp_path)
    expected = f"{path}: holds answers of another model than {tiny_model} or of other sampling; move it away"
    assert str(error.value) == expected
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def talking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "talking", tied=False)


def test_greedy_does_not_depend_on_the_seed(tmp_path: Path, talking_model: Path):
    first, second = (
        read_jsonl(generate(str(talking_model), f"seed{seed}", PROMPTS[:3], options(greedy=True, seed=seed), tmp_path))
        for seed in (1, 2)
    )
    assert by_prompt(first) == by_prompt(second)
    assert len(set(by_prompt(first).values())) == 3


def test_padding_does_not_change_a_greedy_answer(tmp_path: Path, talking_model: Path):
    """The same prompt alone, and beside a longer one."""
    long = [{"role": "user", "content": "say the red house " * 5}]
    alone = generate(str(talking_model), "alone", PROMPTS[:1], options(greedy=True), tmp_path)
    beside = generate(str(talking_model), "beside", [PROMPTS[0], long], options(greedy=True), tmp_path)
    assert by_prompt(read_jsonl(beside)).items() >= by_prompt(read_jsonl(alone)).items()


def test_long_prompts_are_cut(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    draw = tandem.models.scorer.Scorer.draw

    def watching(self: Any, prompts: Any, *given: Any) -> Any:
        seen.extend(map(len, prompts))
        return draw(self, prompts, *given)

    monkeypatch.setattr(tandem.models.scorer.Scorer, "draw", watching)
    long = [{"role": "user", "content": "say the red house " * 50}]
    path = generate(str(tiny_model), "dpo", [long], options(max_prompt_length=20), tmp_path)
    assert seen == [20]
    assert read_jsonl(path)[0]["messages"] == long


def test_a_model_trained_since_is_not_mixed_with_what_it_was(tmp_path: Path, tiny_model: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = generate(str(model), "dpo", PROMPTS[:1], options(), tmp_path)
    times = (model / "model.safetensors").stat()
    trained = load_file(model / "model.safetensors")
    next(iter(trained.values())).add_(1)
    save_file(trained, model / "model.safetensors", metadata={"format": "pt"})
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (model / "model.safetensors").stat().st_size == times.st_size
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"holds answers of .*model with other weights than it has now; move it away"):
        generate(str(model), "dpo", PROMPTS, options(), tmp_path)
    assert path.read_bytes() == before


def test_a_copied_model_is_the_same(tmp_path: Path, tiny_model: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = generate(str(model), "dpo", PROMPTS[:1], options(), tmp_path / "run")
    later = path.stat().st_mtime + 1
    os.utime(model / "model.safetensors", (later, later))
    generate(str(model), "dpo", PROMPTS[:2], options(), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = shutil.copytree(model, tmp_path / "moved")
    path = generate(str(copy), "dpo", PROMPTS[:3], options(), tmp_path / "copy")
    assert len(read_jsonl(path)) == 3


def test_answers_of_older_versions_are_gone_on_with(tmp_path: Path, tiny_model: Path):
    path = generate(str(tiny_model), "dpo", PROMPTS[:1], options(), tmp_path)
    record = read_jsonl(path)[0]
    del record["weights"]
    path.write_text(json.dumps(record) + "\n")
    generate(str(tiny_model), "dpo", PROMPTS[:2], options(), tmp_path)
    assert len(read_jsonl(path)) == 2


def test_an_adapter_is_named_beside_its_base(tmp_path: Path, talking_model: Path):
    """Base and policy in one call, on the same prompts, as the adapter's base and the adapter."""
    adapter = tiny.save_adapter(tmp_path / "adapter", talking_model)
    models = {"base": str(talking_model), "dpo": str(adapter)}
    files = generate_all(models, PROMPTS[:4], options(greedy=True), GenerationOptions(), tmp_path)
    base, dpo = (read_jsonl(files[label]) for label in ("base", "dpo"))
    assert {(record["model"], record["adapter"]) for record in base} == {(str(talking_model), None)}
    assert {(record["model"], record["adapter"]) for record in dpo} == {(str(talking_model), str(adapter))}
    assert by_prompt(base).keys() == by_prompt(dpo).keys()
    assert by_prompt(base) != by_prompt(dpo)


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path, tiny_model: Path):
    with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on .+ is writing there"):
        generate(str(tiny_model), "dpo", PROMPTS, options(), tmp_path)
    generate(str(tiny_model), "dpo", PROMPTS[:1], options(), tmp_path)  # free again


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["dpo"], "--models dpo: must be label=MODEL, as base=MODEL or dpo=out"),
        (["dpo="], "--models dpo=: must be label=MODEL, as base=MODEL or dpo=out"),
        (["../x=m"], "--models ../x=m: must be label=MODEL, as base=MODEL or dpo=out"),
        (["a=m", "a=n"], "--models a=m a=n: a label is there twice"),
    ],
)
def test_labels_are_checked(models: list[str], expected: str):
    with pytest.raises(UserError) as error:
        GenerateOptions(models, "out")
    assert str(error.value) == expected
    assert GenerateOptions(["base=m", "dpo=runs/a=b"], "out").by_label == {"base": "m", "dpo": "runs/a=b"}


@pytest.mark.parametrize(
    ("accelerator", "fast", "asked", "expected"),
    [
        (True, True, None, "bfloat16"),
        (True, False, None, "float32"),  # an old GPU, MPS
        (False, True, None, "float32"),  # a CPU, though it may multiply bfloat16 fast
        (True, True, "float32", "float32"),
        (False, False, "bfloat16", "bfloat16"),
    ],
)
def test_the_type_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, accelerator: bool, fast: bool, asked: str | None, expected: str
):
    with monkeypatch.context() as patch:
        patch.setattr("tandem.devices.has_accelerator", lambda: accelerator)
        patch.setattr("tandem.devices.fast_bf16", lambda: fast)
        engine = TransformersBackend(GenerationOptions(dtype=asked), options())
    engine.load(str(tiny_model))
    assert str(engine._scorer.model.dtype) == f"torch.{expected}"


def test_distinct_prompts_in_their_order():
    pairs = [{"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": [{"role": "user", "content": "a"}]}]
    prompts = held_out_prompts(pairs, None)
    assert [messages[0]["content"] for messages in prompts] == ["b", "a"]
    assert held_out_prompts(pairs, 1) == prompts[:1]


def test_the_first_chosen_answer_counts():
    message = {"role": "assistant", "content": " c "}
    pairs = [
        {"prompt": "a", "chosen": " b "},
        {"prompt": "a", "chosen": "z"},
        {"prompt": [{"role": "user", "content": "x"}], "chosen": [message]},
    ]
    assert list(chosen_answers(pairs).values()) == ["b", "c"]
    assert list(chosen_answers(pairs)) == [prompt_id(messages) for messages in held_out_prompts(pairs, None)]


def test_each_prompt_has_a_seed_of_its_own():
    seeds = {prompt_seed(seed, prompt_id) for seed in (1, 2) for prompt_id in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert prompt_seed(1, "a") in seeds


@pytest.mark.parametrize("broken", ["gone", "no config", "no weights", "no tokenizer", "no shard", "no base", "pickle"])
def test_no_answer_is_drawn_before_all_models_are_known_to_be_there(broken: str, tmp_path: Path, tiny_model: Path):
    """The last model is the one that cannot be loaded."""
    second = tmp_path / "second"
    if broken == "no base":
        second.mkdir()
        (second / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
        (second / "adapter_model.safetensors").touch()
    elif broken != "gone":
        shutil.copytree(tiny_model, second)
    if broken == "no config":
        (second / "config.json").unlink()
    if broken == "no tokenizer":
        (second / "tokenizer_config.json").unlink()
    if broken in ("no weights", "no shard", "pickle"):
        (second / "model.safetensors").unlink()
    if broken == "no shard":
        (second / "model-1.safetensors").touch()
        (second / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
        )
    if broken == "pickle":
        (second / "pytorch_model.bin").touch()
    models = {"base": str(tiny_model), "dpo": str(second)}
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        generate_all(models, PROMPTS[:1], options(), GenerationOptions(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_of_another_type_are_not_mixed(tmp_path: Path, tiny_model: Path, undisturbed: list[dict[str, Any]]):
    path = tmp_path / "generations_dpo.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in undisturbed))
    engine = GenerationOptions(batch_size=3, dtype="bfloat16")
    with pytest.raises(UserError, match=r"holds answers of another --dtype \(float32, now bfloat16\); move it away"):
        generate_all({"dpo": str(tiny_model)}, PROMPTS, options(), engine, tmp_path)
    # what older versions wrote names no setting, or a batch size, and is taken
    for old in ({}, {"batch_size": 8}):
        older = [{name: record[name] for name in record.keys() - {"dtype"}} | old for record in undisturbed]
        path.write_text("".join(json.dumps(record) + "\n" for record in older))
        generate_all({"dpo": str(tiny_model)}, PROMPTS, options(), engine, tmp_path)
        assert len(path.read_text().splitlines()) == len(undisturbed)


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_an_answer_depends_on_no_batch(tmp_path: Path, talking_model: Path, batch_size: int | None):
    """Other batches, and other prompts beside them; answers that end, so that rows leave."""
    model = shutil.copytree(talking_model, tmp_path / "ending")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": list(range(2, 40))}))
    few = options(max_new_tokens=40, temperature=1.5)
    wanted = read_jsonl(generate(str(model), "three", PROMPTS, few, tmp_path))
    assert len({record["n_tokens"] for record in wanted}) > 3
    engine = GenerationOptions(batch_size=batch_size)
    files = generate_all({"other": str(model)}, PROMPTS[2:], few, engine, tmp_path)
    assert by_prompt(wanted).items() >= by_prompt(read_jsonl(files["other"])).items()
