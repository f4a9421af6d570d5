"""What is pushed to the Hub, what is refused, and one real push to a Hub of the test's own."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.errors import UserError
from tandem.report.upload import UploadOptions, complete_model_files, model_card, upload
from tandem.runs import write_manifest
from tests.report import sample_run

ROOT = Path(__file__).parents[2]
TOKEN = "hf_thisIsASecretOfTheTest"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one commit of small files asks for."""

    requests: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        answer: dict[str, Any] = {}
        address = f"http://{self.headers['Host']}/me/model"
        if self.path.endswith("/repos/create"):
            answer = {"url": address, "id": "me/model"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            answer = {"success": True, "commitUrl": f"{address}/commit/abc", "commitOid": "abc"}
        self._reply(200 if answer or "validate-yaml" in self.path else 404, answer)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            there = [
                "adapter_config.json",
                "adapter_model.safetensors",
                "model-1.safetensors",
                "eval.json",
            ]
            return self._reply(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in there])
        self._reply(404, {"error": "not here"})

    def _reply(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, str | None, bytes]]]]:
    handler = type("RecordingHub", (Hub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "checkpoint-4").mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "run.json", "training_metrics.json"):
        (folder / name).write_text("{}")
    for name in ("model.safetensors", "training_args.bin", "README.md", "train.log", "config.yaml"):
        (folder / name).write_bytes(b"x" * 10)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sample_run.write_whole_run(tmp_path_factory.mktemp("runs") / "whole", prompts=20)
    report = json.loads((folder / "data_report.json").read_text())
    report["splits"]["train"]["fingerprint"] = "f00dfacef00dface"
    (folder / "data_report.json").write_text(json.dumps(report))
    return folder


def options(folder: Path, **given: Any) -> UploadOptions:
    return UploadOptions(**{"repo_id": "me/model", "folder": str(folder)} | given)


def test_only_the_model_is_pushed(model: Path) -> None:
    names = [file.name for file in complete_model_files(model)]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_dry_run_names_files_and_shows_the_card(model: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    plan = upload(options(model, run_dir=str(run_dir), dry_run=True))
    assert "would push to me/model" in plan
    assert "10  model.safetensors" in plan
    assert "| metric | Base | SFT | DPO |" in plan
    assert "Preference accuracy | – | 58.0% [48.2% to 67.2%] | 98.0% [93.0% to 99.4%] |" in plan
    assert "training_args.bin" not in plan


def test_card_carries_results_calibration_and_fingerprint(model: Path, run_dir: Path) -> None:
    card = model_card(options(model, run_dir=str(run_dir)))
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata  # it came from a folder, which the Hub does not know
    assert (
        "| Agrees with people (on held-out pairs they labelled; chance is 50%) | 90.0% [79.9% to 95.3%] | 60 |" in body
    )
    assert "| train | 400 | 372 | 49.5% | f00dfacef00dface |" in body
    assert "/models/" not in card and "/data/" not in card  # folders of this machine are nobody's business
    assert "\n\n\n" not in card


def test_card_names_hub_repositories(model: Path, run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    for stage in ("sft", "dpo"):
        run = json.loads((copy / stage / "run.json").read_text())
        run["config"] |= {"model_name_or_path": "google/gemma-3-1b-pt", "dataset_name": "Anthropic/hh-rlhf"}
        (copy / stage / "run.json").write_text(json.dumps(run))
    metadata = yaml.safe_load(model_card(options(model, run_dir=str(copy))).split("---\n")[1])
    assert metadata["base_model"] == "google/gemma-3-1b-pt"
    assert metadata["datasets"] == ["Anthropic/hh-rlhf"]


def test_card_without_a_run_claims_nothing(model: Path) -> None:
    card = model_card(options(model))
    assert "Not evaluated on held-out pairs." in card
    assert "No judge has compared these models" in card
    assert "No data report is at hand." in card


def test_card_keeps_cells_whole(model: Path, run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    results = json.loads((copy / "results.json").read_text())
    results["reference"] = "a|b\n# <script>"
    (copy / "results.json").write_text(json.dumps(results))
    assert r"against a\|b # \<script\>." in model_card(options(model, run_dir=str(copy)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "has not finished"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9),
            "it is not what was trained or merged there: model.safetensors has 9 bytes, not",
        ),
        (lambda folder: _without_manifest(folder, "model.safetensors"), "model.safetensors missing"),
        (lambda folder: _without_manifest(folder, "tokenizer_config.json"), "tokenizer_config.json missing"),
        (lambda folder: _without_manifest(folder, "config.json"), "config.json missing"),
        (lambda folder: _sharded(folder, "{}"), "not an index"),
        (
            lambda folder: _sharded(folder, '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'),
            "one.safetensors, two.safetensors missing",
        ),
        (lambda folder: _adapter(folder), "adapter_model.safetensors missing"),
    ],
)
def test_incomplete_models_are_refused(model: Path, damage: Any, message: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=message):
        upload(options(model, dry_run=True))


def _without_manifest(folder: Path, name: str) -> None:
    """A folder that Tandem did not make, without one of its files."""
    for file in ("manifest.json", "config.yaml", name):
        (folder / file).unlink()


def _sharded(folder: Path, index: str) -> None:
    _without_manifest(folder, "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)


def _adapter(folder: Path) -> None:
    _without_manifest(folder, "config.json")
    (folder / "adapter_config.json").write_text("{}")


@pytest.fixture
def adapter(model: Path) -> Path:
    _without_manifest(model, "config.json")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/demo/sft_merged", "r": 8}')
    (model / "adapter_model.safetensors").write_bytes(b"x")
    return model


def test_an_adapter_on_a_folder_is_refused_or_told_its_base(
    adapter: Path, hub: tuple[str, list[tuple[str, str | None, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (options(adapter), options(adapter, dry_run=True)):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(UserError, match=r"an adapter on runs/demo/sft_merged, a folder .* --base_model"):
            upload(asked)
    address, requests = hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    upload(options(adapter, base_model="me/sft"))
    (commit,) = [body for path, _, body in requests if path.endswith("/commit/main")]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in map(json.loads, commit.splitlines())
        if line["key"] == "file"
    }
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "me/sft", "r": 8}
    assert b"runs/demo" not in b"".join(files.values())
    card = files["README.md"].decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/model")' in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/sft"


CONFIG = {
    "_name_or_path": "/home/me/runs/dpo",
    "architectures": ["LlamaForCausalLM"],
    "rope": {"source": "~/models/llama", "type": "linear"},
    "tokenizer_file": "/root/.cache/huggingface/tokenizer.json",
    "unk": "/",
    "eos_token": "</s>",
    "auto_map": {"AutoConfig": "me/code--configuration.Own"},
    "kept": "see docs/models.md",
}


def test_no_place_of_this_machine_is_pushed(model: Path) -> None:
    from tandem.report.published import configuration, without_places

    (model / "config.json").write_text(json.dumps(CONFIG))
    public = json.loads(bytes(configuration(model / "config.json")))
    assert public == {
        "architectures": ["LlamaForCausalLM"], "rope": {"type": "linear"}, "unk": "/", "eos_token": "</s>",
        "auto_map": {"AutoConfig": "me/code--configuration.Own"}, "kept": "see docs/models.md",
    }  # fmt: skip
    assert without_places({"name_or_path": "meta-llama/Llama-3.2-1B"}) == {"name_or_path": "meta-llama/Llama-3.2-1B"}
    for place in ("runs/demo/sft", "C:\\models\\sft", "../sft", "./sft", "file:///models/sft"):
        assert without_places({"_name_or_path": place, "vocab_size": 3}) == {"vocab_size": 3}
    (model / "config.json").write_text(json.dumps(public))
    assert configuration(model / "config.json") == model / "config.json"


@pytest.mark.parametrize(
    ("name", "goes"),
    [("adapter_config.json", True), ("model-00001-of-00002.safetensors", True), ("pytorch_model.bin", True),
     ("config.json", True), ("generation_config.json", True), ("tokenizer.model", True), ("vocab.json", True),
     ("added_tokens.json", True), ("special_tokens_map.json", True), ("chat_template.jinja", True),
     ("eval.json", False), ("figure.png", False), (".gitattributes", False), ("onnx/model.onnx", False)],
)  # fmt: skip
def test_what_an_earlier_push_left(name: str, goes: bool) -> None:
    from tandem.report.published import would_be_loaded

    assert would_be_loaded(name) == goes


@pytest.mark.parametrize("name", ["Apache 2.0", "Apache-2.0", "MIT License", "https://x/LICENSE", ""])
def test_a_license_that_the_hub_does_not_know(name: str, model: Path) -> None:
    with pytest.raises(UserError, match="must be the Hub's name for it"):
        options(model, license=name)


def test_the_card_has_what_the_hub_shows(model: Path, run_dir: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(options(model, run_dir=str(run_dir), license="apache-2.0", base_model="me/base")))
    data = card.data
    assert (data.license, data.base_model, data.pipeline_tag) == ("apache-2.0", "me/base", "text-generation")
    results = json.loads((run_dir / "results.json").read_text())["models"]["dpo"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["accuracy"] == pytest.approx(results["preference_accuracy"]["value"])
    assert found["perplexity"] == pytest.approx(results["perplexity_chosen"]["value"], rel=1e-5)
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in card.text


@pytest.mark.parametrize("name", ["./model", "runs/demo/sft", "me/../x", "pairs.jsonl", "me/data.parquet"])
def test_a_base_that_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="--base_model"):
        options(Path("."), base_model=name)


@pytest.mark.parametrize("repo_id", ["model", "me/", "../model", "me/model/x", "me/mo--del", "me/mo..del", "-me/model"])
def test_wrong_repo_ids_are_refused(repo_id: str) -> None:
    with pytest.raises(UserError, match="--repo_id"):
        options(Path("."), repo_id=repo_id)


def test_token_comes_from_the_environment_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN is not set"):
        upload(options(model))


def run_script(model: Path, run_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/upload_hf.py", "--repo_id", "me/model", "--folder", model]
    given = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return subprocess.run(
        [*command, "--run_dir", run_dir],
        capture_output=True,
        text=True,
        check=False,
        env=given | environment,
        timeout=60,
    )


def test_push_is_one_commit(
    model: Path, run_dir: Path, tmp_path: Path, hub: tuple[str, list[tuple[str, str | None, bytes]]]
) -> None:
    address, requests = hub
    done = run_script(model, run_dir, HF_ENDPOINT=address, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{address}/me/model/commit/abc"
    commits = [body for path, _, body in requests if path.endswith("/commit/main")]
    assert len(commits) == 1
    pushed = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in map(json.loads, commits[0].splitlines())
        if line["key"] == "file"
    }
    assert sorted(pushed) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    deleted = [
        line["value"]["path"] for line in map(json.loads, commits[0].splitlines()) if line["key"] == "deletedFile"
    ]
    # left by an earlier push: beside a whole model from_pretrained would load the adapter
    assert deleted == ["adapter_config.json", "adapter_model.safetensors", "model-1.safetensors"]
    assert pushed["README.md"].decode() == model_card(options(model, run_dir=str(run_dir)))
    assert {token for _, token, _ in requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in body for _, _, body in requests)


def test_refusal_of_the_hub_is_one_line(model: Path, run_dir: Path, tmp_path: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    for environment, message in (
        (nobody, "the Hub refused me/model"),
        (nobody | {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ):
        done = run_script(model, run_dir, **environment)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().count("\n") == 0
        assert message in done.stderr
        assert TOKEN not in done.stderr


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_as_private_as_was_asked(
    private: bool,
    model: Path,
    hub: tuple[str, list[tuple[str, str | None, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, requests = hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload(options(model, private=private))
    commits = [body for path, _, body in requests if path.endswith("/commit/main")]
    assert b"model.safetensors" in commits[0]
    (created,) = (json.loads(body) for path, _, body in requests if path.endswith("/repos/create"))
    assert created["organization"] == "me"
    assert created["visibility"] == ("private" if private else "public")
