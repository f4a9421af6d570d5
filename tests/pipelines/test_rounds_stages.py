"""rounds.sh to its second round: every stage's command line, fast; the stages themselves on a tiny model, slowly."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.judge.fault_server import FaultServer
from tests.pipelines.test_rounds import PIPELINE, RECIPE, ROOT, environment
from tests.rounds.test_reward import save as save_reward

# Stands in for the programs of the stages: leaves what they leave, and says that each round is better
STAND_IN = r"""#!/usr/bin/env bash
case "$*" in
  *tandem.launch.preflight*) cat >/dev/null; exit ;;
  *tandem.launch.supervise*) shift 2; TANDEM_LOG=$2 exec "$3" ;;
  *tandem.launch.stamp*) cat >/dev/null; [[ $3 != begin ]] || touch "$5/.stages/$6.begun"; exit ;;
  *tandem.rounds.recipe*) echo '{}'; exit ;;
  -c*) [[ $* == *round*stop* ]] && exit 1; exec "$REAL" "$@" ;;
esac
for word in "$@"; do printf '%s ' "${word//$OUTPUT_DIR/RUN}"; done >>"$LOG"; echo >>"$LOG"
previous=
for word in "$@"; do
  case $previous in
    --output_dir) mkdir -p "$word"; touch "$word"/{samples,scores,pairs}.jsonl ;;
    --report) touch "$word" ;;
    --run_dir) touch "$word"/{report.html,rounds.json,rounds.md} ;;
  esac
  previous=$word
done
"""


# A later answer is a better one, so that no round stops the pipeline
CHECK = """
import pathlib
ASKED = pathlib.Path(__file__).with_name("asked.txt")

def score(prompt, answer, row):
    with ASKED.open("a") as log:
        log.write("x")
    return ASKED.stat().st_size

def shorter(prompt, answer, row):
    return -len(answer)
"""


def commands(tmp_path: Path, **changes: str) -> dict[str, str]:
    """The command line of each script that rounds.sh runs, by script and round, the checkout's paths left out."""
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python").write_text(STAND_IN)
    (bin_ / "python").chmod(0o755)
    given = environment(tmp_path, **changes) | {"PATH": f"{bin_}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    given |= {"REAL": shutil.which("python3") or "", "ACCELERATE_CONFIG": "a.yaml"}
    (tmp_path / "recipe").mkdir()
    done = subprocess.run([tmp_path / "pipelines" / "rounds.sh"], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = (tmp_path / "log").read_text().replace(f"{tmp_path}/", "").splitlines()
    names = [re.findall(r"(?:scripts/|tandem[.]rounds[.])(\w+)", line)[0] for line in lines]
    return {f"{number} {name}": line for number, (name, line) in enumerate(zip(names, lines, strict=True))}


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_what_the_second_round_is_told(tmp_path: Path, reference: str):
    """The policy goes on from round 1, whatever the reference is; given pairs are mixed in by their share."""
    told = commands(
        tmp_path, ROUNDS="2", REFERENCE=reference, OFFLINE_PAIRS="given.jsonl", OFFLINE_SHARE="0.25",
        SECOND_SCORER="function:check.py:other", MOUNT_DIR="mirror",
    )  # fmt: skip
    names = [key.split()[1] for key in told]
    a_round = ["sample", "score", "make_pairs", "offline", "dpo", "report", "sample", "score", "rounds"]
    assert names == ["sample", "score", "check_data", *a_round, *a_round, "report"]
    first, second = (line for key, line in told.items() if key.endswith(" dpo"))
    assert "--model_name_or_path model " in first
    assert "--model_name_or_path RUN/round_1/dpo " in second
    assert "--dataset_name RUN/round_2/mixture.yaml " in second
    assert "--config RUN/round_2/dpo.yaml " in second
    assert "--mount_dir mirror/round_2 " in second
    assert "--reference_model" not in first
    assert ("--reference_model model " in second) == (reference == "initial")
    assert (tmp_path / "run" / "round_2" / "mixture.yaml").read_text().splitlines() == [
        f'- {{dataset_name: "{tmp_path}/run/round_2/pairs/pairs.jsonl", weight: 0.75}}',
        f'- {{dataset_name: "{tmp_path}/run/offline.jsonl", weight: 0.25}}',
    ]
    drawn = [line for key, line in told.items() if key.endswith(" sample")]
    assert [line.split("--models ")[1].split()[0] for line in drawn] == [
        "policy=model", "policy=model", "policy=RUN/round_1/dpo", "policy=RUN/round_1/dpo", "policy=RUN/round_2/dpo",
    ]  # fmt: skip
    assert ["--held_out" in line for line in drawn] == [True, False, True, False, True]
    assert [line.split("--part ")[1].split()[0] for line in drawn if "--part " in line] == ["1", "2"]
    scored = [line for key, line in told.items() if key.endswith(" score")]
    wanted = "--score_function check.py:score check.py:other --rank_by function:check.py:score "
    assert all(wanted in line for line in scored)


def test_a_judge_compares_answers_and_the_single_ones_with_round_0s(tmp_path: Path):
    told = commands(
        tmp_path, ROUNDS="1", SCORER="judge:j", JUDGE_BASE_URL="http://h/v1", SECOND_SCORER="reward:r"
    )  # fmt: skip
    scored = [line for key, line in told.items() if key.endswith(" score")]
    base = "--judge_against RUN/round_0/held_out/samples.jsonl "
    assert [base in line for line in scored] == [True, False, True]
    wanted = "--reward_models r --judge_model j --judge_base_url http://h/v1 --rank_by judge:j "
    assert all(wanted in line for line in scored)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "model", tied=False)
    save_reward(tmp_path / "reward", "eos")
    tiny.save_pairs(tmp_path / "given.jsonl", tiny.hh_rows(12))
    rows = [json.dumps({"prompt": f"say {word} {index}"}) + "\n" for index in range(2) for word in tiny.WORDS]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "check.py").write_text(CHECK)
    (tmp_path / "recipe").mkdir()
    for name, text in RECIPE.items():
        (tmp_path / "recipe" / f"{name}.yaml").write_text(text)
    return tmp_path


def run(folder: Path, **changes: str) -> str:
    done = subprocess.run([PIPELINE], env=environment(folder, **changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def stages(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("== ") and " s" not in line[-6:]]


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_two_rounds_with_all_that_can_be_asked_for(folder: Path, reference: str):
    given = {
        "ROUNDS": "2", "REFERENCE": reference, "OFFLINE_PAIRS": str(folder / "given.jsonl"), "OFFLINE_SHARE": "0.4",
        "SECOND_SCORER": f"reward:{folder}/reward", "MOUNT_DIR": str(folder / "mount"),
    }  # fmt: skip
    run(folder, **given)
    results = json.loads((folder / "run" / "rounds.json").read_text())
    assert [row["round"] for row in results["rounds"]] == [0, 1, 2]
    assert all(row["kl"]["per_token"]["value"] is not None for row in results["rounds"][1:])
    assert list(results["rounds"][2]["others"]) == [f"reward:{folder}/reward"]
    for number in (1, 2):
        own = folder / "run" / f"round_{number}"
        assert (folder / "mount" / f"round_{number}" / "dpo" / "adapter_model.safetensors").is_file()
        assert (own / "report.html").is_file()
        config = json.loads((own / "dpo" / "run.json").read_text())["config"]
        assert (config["reference_model"] is not None) == (reference == "initial" and number == 2)
    again = run(folder, **given)
    assert len(stages(again)) == 20
    assert all("done before" in line for line in stages(again))
    refused = subprocess.run(
        [PIPELINE], env=environment(folder, **given | {"OFFLINE_SHARE": "0.5"}), capture_output=True, text=True
    )
    assert refused.returncode == 2


@pytest.mark.slow
def test_a_judge_ranks(folder: Path):
    """The answers to a prompt are compared, the single ones to held-out prompts are marked, by the fake server."""

    def mark(body: dict[str, Any], reply: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if "Mark: N" not in json.dumps(body):
            return None
        message = {"role": "assistant", "content": "So so.\nMark: 7"}
        return 200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}

    server = FaultServer(decide=lambda a, b: "A" if len(a) < len(b) else "B")
    server.instead = mark
    with server.serving() as url:
        second = f"function:{folder}/check.py:shorter"
        run(folder, ROUNDS="1", SCORER="judge:j", JUDGE_BASE_URL=url, SECOND_SCORER=second)
    rows = json.loads((folder / "run" / "rounds.json").read_text())["rounds"]
    assert [row["mean_score"]["value"] for row in rows] == [7, 7]
    pairs = [json.loads(line) for line in (folder / "run/round_1/pairs/pairs.jsonl").open()]
    assert pairs
    assert all(pair["provenance"]["chosen"]["scorer"] == "judge:j" for pair in pairs)
    assert all(len(pair["chosen"][0]["content"]) <= len(pair["rejected"][0]["content"]) for pair in pairs)
