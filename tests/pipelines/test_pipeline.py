"""dpo_pipeline_sanity.sh as a user runs it, with a tiny random model: to the end, killed, again, changed, failing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tandem.runs import is_complete, sha256_file
from tests import tiny
from tests.judge.fault_server import FaultServer

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "pipelines" / "dpo_pipeline_sanity.sh"
STAGES = ["check", "sft", "merge_sft", "dpo", "merge_dpo", "evaluate", "compare", "judge", "report"]
OUTPUTS = [
    "data_report.json",
    "sft",
    "sft_dpo_init_merged",
    "dpo",
    "dpo_sanity_merged",
    "results.json",
    "generation_samples.json",
    "dpo_comparison_results.json",
    "generations_base.jsonl",
    "generations_sft.jsonl",
    "generations_dpo.jsonl",
    "judge_summary.json",
    "report.html",
]
TRAINING = {
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_peft": True,
    "learning_rate": 1e-3,
    "logging_steps": 1,
}
RECIPE = {
    "check": {"max_length": 256},
    "sft": TRAINING | {"max_steps": 2},
    "dpo": TRAINING | {"max_steps": 40, "save_steps": 4, "save_total_limit": 20},
    "evaluate": {"max_length": 256, "eval_bf16": False, "kl_prompts": 4, "kl_max_new_tokens": 8},
    "compare": {"max_prompts": 6, "max_new_tokens": 8},
    "judge": {"calibration_pairs": 2, "self_pairs": 1},
}


def write_recipe(folder: Path, **changes: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    for stage, options in RECIPE.items():
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(options | changes.get(stage, {})))
    return folder


class Pipeline:
    """One run folder and the environment that its commands share."""

    script = PIPELINE

    def __init__(self, folder: Path, model: Path, data: Path, judge: str) -> None:
        self.run = folder / "run"
        self.recipe = write_recipe(folder / "recipe", dpo={"ref_cache": str(folder / "reference")})
        self.environment = os.environ | {
            "MODEL_NAME": str(model),
            "DATASET": str(data),
            "OUTPUT_DIR": str(self.run),
            "RECIPE": str(self.recipe),
            "JUDGE_MODEL": "judge",
            "JUDGE_BASE_URL": judge,
            "MOUNT_DIR": str(folder / "mount"),
        }
        self.environment.pop("WANDB_MODE", None)

    def start(self, **changes: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(self.script)],
            env=self.environment | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, **changes: str) -> tuple[int, str]:
        """The exit code, and all that was on screen."""
        process = self.start(**changes)
        screen, _ = process.communicate()
        return process.returncode, screen

    def state(self) -> dict[str, tuple[int, str]]:
        """Time and hash of every file but the log, which every command adds to."""
        log = self.run / "dpo_pipeline_sanity.log"
        files = [path for path in self.run.rglob("*") if path.is_file() and path != log]
        return {str(path): (path.stat().st_mtime_ns, sha256_file(path)) for path in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.save_pairs(folder / "train.jsonl", tiny.hh_rows(30))
    tiny.save_pairs(folder / "test.jsonl", tiny.hh_rows(10, start=30))
    return folder


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with FaultServer().serving() as url:
        yield url


@pytest.fixture(scope="module")
def killed_and_resumed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, judge: str
) -> tuple[Pipeline, str]:
    """kill -9 of the whole pipeline in the middle of dpo, then the same command to its end; and what that showed."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"), tiny_model, data, judge)
    process = pipeline.start()
    while not (pipeline.run / "dpo" / "checkpoint-8").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not is_complete(pipeline.run / "dpo")
    code, screen = pipeline()
    assert code == 0, screen
    return pipeline, screen


def test_every_stage_leaves_its_output(killed_and_resumed: tuple[Pipeline, str]):
    pipeline, _ = killed_and_resumed
    for name in OUTPUTS:
        assert (pipeline.run / name).exists(), name
    for name in ("sft", "sft_dpo_init_merged", "dpo", "dpo_sanity_merged"):
        assert is_complete(pipeline.run / name), name
    for name in ("sft", "dpo"):
        assert (pipeline.run / name / "training_metrics.json").exists()
        assert is_complete(pipeline.run.parent / "mount" / name)
    results = json.loads((pipeline.run / "results.json").read_text())
    assert list(results["models"]) == ["base", "sft", "dpo"]
    assert results["n_pairs"] == 10
    assert results["reference"] == pipeline.environment["MODEL_NAME"]
    comparison = json.loads((pipeline.run / "dpo_comparison_results.json").read_text())
    assert list(comparison["models"]) == ["base", "sft", "dpo"]
    assert len(comparison["comparisons"]) == 6
    report = (pipeline.run / "report.html").read_text()
    assert "<html" in report and "launch scripts/dpo.py --config " in report  # the commands that ran


def test_finished_stages_are_not_repeated_after_a_kill(killed_and_resumed: tuple[Pipeline, str]):
    _, screen = killed_and_resumed
    done = [line.split(":")[0].removeprefix("== ") for line in screen.splitlines() if ": done before (" in line]
    assert done == ["check", "sft", "merge_sft"]
    assert "resuming from " in screen
    ran = [line.removeprefix("== ") for line in screen.splitlines() if line.startswith("== ") and ":" not in line]
    assert ran == STAGES[3:]


def test_all_on_screen_is_in_the_log(killed_and_resumed: tuple[Pipeline, str]):
    pipeline, screen = killed_and_resumed
    assert screen in (pipeline.run / "dpo_pipeline_sanity.log").read_text()


def test_a_kill_changes_nothing_in_the_weights(killed_and_resumed: tuple[Pipeline, str], script, tmp_path: Path):
    """The DPO of the pipeline against one that nobody disturbed, and the merged models made of them."""
    pipeline, _ = killed_and_resumed
    config = ["--config", str(pipeline.run / "dpo" / "config.yaml"), "--output_dir", str(tmp_path / "dpo")]
    script("dpo").main([*config, "--mount_dir", "none"])
    name = "adapter_model.safetensors"
    assert sha256_file(tmp_path / "dpo" / name) == sha256_file(pipeline.run / "dpo" / name)
    script("merge_lora").main(["--adapter", str(tmp_path / "dpo"), "--output_dir", str(tmp_path / "merged")])
    for file in (pipeline.run / "dpo_sanity_merged").glob("*.safetensors"):
        assert sha256_file(tmp_path / "merged" / file.name) == sha256_file(file)


def test_the_same_command_again_does_nothing_but_say_so(killed_and_resumed: tuple[Pipeline, str]):
    pipeline, _ = killed_and_resumed
    before, started = pipeline.state(), time.monotonic()
    code, screen = pipeline()
    assert code == 0, screen
    assert time.monotonic() - started < 5
    assert [line.split(":")[0] for line in screen.splitlines()[:-1]] == [f"== {stage}" for stage in STAGES]
    assert all(": done before (" in line for line in screen.splitlines()[:-1])
    assert screen.splitlines()[-1] == f"Report: {pipeline.run}/report.html"
    assert pipeline.state() == before


def test_other_settings_are_refused(killed_and_resumed: tuple[Pipeline, str], tmp_path: Path):
    pipeline, _ = killed_and_resumed
    before = pipeline.state()
    recipe = pipeline.recipe / "dpo.yaml"
    content = recipe.read_text()
    recipe.write_text(content + "beta: 0.2\n")
    code, screen = pipeline()
    recipe.write_text(content)
    assert code == 2
    assert screen.splitlines()[-1] == (
        f"UserError: stage dpo was done with other settings in {pipeline.run} (beta was 0.1, is 0.2): "
        f"set another OUTPUT_DIR, or remove {pipeline.run}/dpo"
    )
    assert pipeline.state() == before


def test_other_data_under_the_same_name_is_refused(killed_and_resumed: tuple[Pipeline, str], data: Path):
    """Of the same size and date too."""
    pipeline, _ = killed_and_resumed
    content, times = (data / "train.jsonl").read_bytes(), (data / "train.jsonl").stat()
    other = content.replace(b"cat", b"owl")
    assert other != content and len(other) == len(content)
    for now in (other, content):
        (data / "train.jsonl").write_bytes(now)
        os.utime(data / "train.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
        code, screen = pipeline()
        assert code == (2 if now == other else 0), screen
        assert ("UserError: stage check was done with other settings" in screen) == (now == other)
        assert ("dataset_name " in screen and " has another content" in screen) == (now == other)


def test_a_copy_of_a_run_and_of_its_data_is_passed_over(killed_and_resumed: tuple[Pipeline, str], tmp_path: Path):
    pipeline, _ = killed_and_resumed
    shutil.copytree(pipeline.run, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.copytree(pipeline.environment["DATASET"], tmp_path / "data", copy_function=shutil.copyfile)
    code, screen = pipeline(
        OUTPUT_DIR=str(tmp_path / "copy"), DATASET=str(tmp_path / "data"), MOUNT_DIR=str(tmp_path / "drive")
    )
    assert code == 0, screen
    assert [line.split(":")[0] for line in screen.splitlines()[:-1]] == [f"== {stage}" for stage in STAGES]
    assert all(": done before (" in line for line in screen.splitlines()[:-1])


def test_a_failing_middle_stage_stops_the_pipeline(
    killed_and_resumed: tuple[Pipeline, str], tmp_path: Path, tiny_model: Path, data: Path
):
    """Wrong input that shows in sft: later stages do not run, and the same command goes on there when it is mended."""
    pipeline = Pipeline(tmp_path, tiny_model, data, "http://127.0.0.1:1/v1")
    write_recipe(pipeline.recipe, sft={"use_flash_attention": True})
    log = pipeline.run / "dpo_pipeline_sanity.log"
    for attempt in (1, 2):
        code, screen = pipeline()
        assert code == 2
        assert "UserError: --use_flash_attention is of optimum-habana" in screen
        assert screen.splitlines()[-1] == (
            f"== sft was given wrong input (exit code 2). Log: {log}. The same command goes on from here."
        )
        assert ("== check: done before" in screen) == (attempt == 2)
        assert "== merge_sft" not in screen
        assert sorted(path.name for path in pipeline.run.iterdir() if path.suffix == "" and path.name[0] != ".") == []


def test_no_model_name(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "MODEL_NAME"}
    done = subprocess.run(
        [str(PIPELINE)], env=environment | {"OUTPUT_DIR": str(tmp_path / "run")}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "UserError: MODEL_NAME is required: a model folder or Hub name\n")
    assert not (tmp_path / "run").exists()


# lib.sh by itself, with stages that are one-liners


@pytest.fixture
def road(tmp_path: Path):
    """`road("stage …", …)`: a pipeline of these lines; its exit code and screen."""
    assert shutil.which("bash")

    def run(*lines: str) -> tuple[int, str]:
        text = f'#!/usr/bin/env bash\nsource "{ROOT}/pipelines/lib.sh"\nRUN={tmp_path}/run\nlog_to "$RUN/log"\n'
        path = tmp_path / "road.sh"
        path.write_text(text + "\n".join(lines) + "\n")
        path.chmod(0o755)
        done = subprocess.run([str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.stdout in (tmp_path / "run" / "log").read_text()
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (1, "failed"),
        (2, "was given wrong input"),
        (3, "was stopped by an alarm: see {run}/two/logs/alarms.jsonl"),
        (75, "was preempted"),
        (137, "failed"),
    ],
)
def test_how_a_stage_ended(road, tmp_path: Path, code: int, why: str):
    run = tmp_path / "run"
    status, screen = road(
        'stage one a touch "$RUN/a"', f"stage two b bash -c 'exit {code}'", 'stage three c touch "$RUN/c"'
    )
    assert status == code
    assert screen.splitlines()[-1] == (
        f"== two {why.format(run=run)} (exit code {code}). Log: {run}/log. The same command goes on from here."
    )
    assert (run / "a").exists()
    assert not (run / "c").exists()


def test_a_stage_without_its_output_has_failed(road):
    status, screen = road("stage one a true")
    assert status == 1
    assert "== one failed (exit code 1)." in screen


def test_a_stage_that_runs_again_takes_the_later_ones_with_it(road, tmp_path: Path):
    stages = [
        f'stage {name} {name}.out bash -c \'date +%N >"$0"\' "$RUN/{name}.out"' for name in ("one", "two", "three")
    ]
    assert road(*stages)[0] == 0
    first = {name: (tmp_path / "run" / f"{name}.out").read_text() for name in ("one", "two", "three")}
    (tmp_path / "run" / "two.out").unlink()
    status, screen = road(*stages)
    assert status == 0
    assert "== one: done before" in screen
    assert "== three: two ran again, so " in screen
    second = {name: (tmp_path / "run" / f"{name}.out").read_text() for name in ("one", "two", "three")}
    assert [name for name in first if first[name] != second[name]] == ["two", "three"]


def test_a_kill_between_two_stages_does_not_make_the_later_ones_pass_for_new(road, tmp_path: Path):
    stages = [
        f'stage {name} {name}.out bash -c \'date +%N >"$0"\' "$RUN/{name}.out"' for name in ("one", "two", "three")
    ]

    def outputs() -> dict[str, str]:
        return {path.stem: path.read_text() for path in (tmp_path / "run").glob("*.out")}

    assert road(*stages)[0] == 0
    first = outputs()
    (tmp_path / "run" / "one.out").unlink()
    assert road(stages[0], "kill -9 $$")[0] == 137
    status, screen = road(*stages[:2], "kill -9 $$")
    assert "== two: one ran again, so " in screen
    status, screen = road(*stages)
    assert status == 0 and "== three: two ran again, so " in screen
    second = outputs()
    assert first.keys() == second.keys() and not any(first[name] == second[name] for name in first)
    status, screen = road(*stages)
    assert screen.count("done before") == 3


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_local_judge_is_stopped_at_the_end(road, tmp_path: Path, free_port: int):
    """A stand-in for `transformers serve` that answers /health: it must be up for the command and gone after it."""
    fake = tmp_path / "bin" / "transformers"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env python3\nimport http.server, os, sys\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n        self.send_response(200); self.end_headers(); self.wfile.write(b'{}')\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])), Health).serve_forever()\n"
    )
    fake.chmod(0o755)
    for command, expected in (("true", 0), ("false", 1)):
        status, screen = road(
            f"PATH={tmp_path}/bin:$PATH JUDGE_MODEL=m JUDGE_PORT={free_port}",
            f"stage judge x with_local_judge bash -c 'touch \"{tmp_path}/run/x\"; {command}'",
        )
        assert status == expected, screen
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        (tmp_path / "run" / "x").unlink()


def test_a_local_judge_does_not_share_its_port(road, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, screen = road(f"JUDGE_MODEL=m JUDGE_PORT={port}", "stage judge x with_local_judge true")
    assert status == 2
    assert f"UserError: port {port} of the local judge is taken: set another JUDGE_PORT" in screen


def test_a_local_judge_that_does_not_start(road, tmp_path: Path, free_port: int):
    fake = tmp_path / "bin" / "transformers"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho no such model\nexit 1\n")
    fake.chmod(0o755)
    status, screen = road(
        f"PATH={tmp_path}/bin:$PATH JUDGE_MODEL=m JUDGE_PORT={free_port}", "stage judge x with_local_judge true"
    )
    assert status == 2
    assert f"UserError: the local judge did not start: see {tmp_path}/run/judge_server.log" in screen
    assert (tmp_path / "run" / "judge_server.log").read_text() == "no such model\n"
