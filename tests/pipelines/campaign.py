"""kill -9 at random moments of every stage of a pipeline, and machines lost with all that was on them.

    python -m tests.pipelines.campaign FOLDER [--pipeline rounds] [--kills 40] [--losses 10] [--seconds 450]

A life is a run in a new place that is killed once in each stage, and the same command again until it is done; what it
leaves is compared with what a run leaves that nobody disturbed. FOLDER keeps the state, so that a campaign may be
stopped after any kill, and gone on with. Where the kills come is drawn from the life's number alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import yaml

from tests import tiny
from tests.crash.traces import differences, normal
from tests.judge.fault_server import FaultServer
from tests.pipelines import test_pipeline, test_rounds

ROOT = Path(__file__).parents[2]
TRAINING = test_pipeline.TRAINING | {"max_length": 128, "save_steps": 2, "save_total_limit": 2}
RECIPE = {
    "check": {"max_length": 128},
    "sft": TRAINING | {"max_steps": 4},
    "dpo": TRAINING | {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3},
    "evaluate": {"max_length": 128, "eval_bf16": False, "kl_prompts": 4, "kl_max_new_tokens": 8},
    "compare": {"max_prompts": 4, "max_new_tokens": 8},
    "judge": {"calibration_pairs": 2, "self_pairs": 1},
}


END = "the same command to its end"

# Answers of a later round are better, so that none stops the pipeline: the command line names the round's folder
LATER_IS_BETTER = """
import re
import sys

def score(prompt, answer, row):
    return len(answer) % 7 + 10 * int(re.findall("round_([0-9]+)", " ".join(sys.argv))[-1])
"""


@dataclass
class Attempt:
    """A command as far as it came: (stage, second) at each stage's start, and its exit code if it ended by itself."""

    stages: list[tuple[str, float]] = field(default_factory=list)
    screen: str = ""
    seconds: float = 0.0
    code: int | None = None


class Machine:
    """Where a pipeline runs: `place`/machine is what is lost with it, `place`/drive is what is kept.

    Args:
        command, environment: of the pipeline, whose run folder is `place`/machine/run.
    """

    def __init__(self, place: Path, command: Path, environment: dict[str, str]) -> None:
        self.place, self.command = place, command
        self.run = place / "machine" / "run"
        self.environment = environment | {"OUTPUT_DIR": str(self.run)}

    def attempt(self, kill: Callable[[Attempt], bool] = lambda attempt: False) -> Attempt:
        """Start the command; SIGKILL to all its processes once `kill` says so."""
        done, started = Attempt(), time.monotonic()
        process = subprocess.Popen(
            [self.command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                done.screen += line
                if line.startswith("== ") and ":" not in line and "(" not in line:
                    done.stages.append((line.removeprefix("== ").strip(), time.monotonic() - started))

        reader = threading.Thread(target=read)
        reader.start()
        while process.poll() is None:
            done.seconds = time.monotonic() - started
            if kill(done):
                all_started = psutil.Process(process.pid).children(recursive=True)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _, alive = psutil.wait_procs(all_started, timeout=30)
                assert not alive, f"these outlive the pipeline: {[item.cmdline() for item in alive]}"
                reader.join()
                return done
            time.sleep(0.005)
        reader.join()
        done.seconds, done.code = time.monotonic() - started, process.returncode
        return done

    def lose(self) -> None:
        shutil.rmtree(self.place / "machine", ignore_errors=True)


class Campaign:
    """Lives of one pipeline, until there were so many kills and losses."""

    def __init__(self, folder: Path, command: Path, environment: dict[str, str]) -> None:
        self.folder, self._state = folder, folder / "campaign.json"
        self.machine = Machine(folder / "life", command, environment)
        self.state: dict[str, Any] = {"lives": 0, "kills": 0, "losses": 0, "hits": {}, "faults": [], "plan": []}
        if self._state.exists():
            self.state |= json.loads(self._state.read_text())

    def straight(self) -> None:
        """The run that nobody disturbs, in the place of the others, so that its paths are theirs."""
        if (self.folder / "straight").exists():
            return
        self._new_life()
        done = self.machine.attempt()
        assert done.code == 0, done.screen
        ends = [second for _, second in done.stages[1:]] + [done.seconds]
        self.state["took"] = {name: end - begun for (name, begun), end in zip(done.stages, ends, strict=True)}
        self._say(f"undisturbed: {done.seconds:.0f} s: {self.state['took']}")
        self.machine.place.rename(self.folder / "straight")
        self._save()

    def go_on(self, kills: int, losses: int, until: float) -> bool:
        """Live until there were so many of both, or the clock says `until`; whether there were."""
        while self.state["plan"] or self.state["kills"] < kills or self.state["losses"] < losses:
            if time.monotonic() > until:
                return False
            if not self.state["plan"]:
                self._begin_life(lost=self.state["losses"] < losses)
            elif self.state["plan"][0] == [END, 0, False]:
                self._end_life()
            else:
                self._kill()
            self._save()
        return True

    def _begin_life(self, lost: bool) -> None:
        """Plan one: (stage, second after its start, whether the machine is lost with it) of each kill."""
        self.state["lives"] += 1
        rng = random.Random(self.state["lives"])
        took = self.state["took"]
        plan = []
        losses = rng.sample(sorted(took), 3) if lost else []
        for stage, seconds in took.items():
            for lose in [True, False] if stage in losses else [False]:
                plan.append([stage, rng.uniform(0, 1.1 * seconds), lose])
        self.state["plan"] = [*plan, [END, 0, False]]
        self._new_life()

    def _kill(self) -> None:
        stage, second, lose = self.state["plan"].pop(0)
        life = f"life {self.state['lives']}"
        done = self.machine.attempt(_in_stage(stage, second))
        if done.code is not None:
            self._say(f"{life}: {stage} was over: exit code {done.code}")
            self.state["plan"] = [[END, 0, False]]
            return
        hit = done.stages[-1][0] if done.stages else "start"
        self.state["hits"][hit] = self.state["hits"].get(hit, 0) + 1
        self.state["kills"] += 1
        if lose:
            self.machine.lose()
            self.state["losses"] += 1
        and_lost = ", the machine lost" if lose else ""
        self._say(f"{life}: kill {self.state['kills']} after {done.seconds:.1f} s, in {hit}{and_lost}")

    def _end_life(self) -> None:
        number = self.state["lives"]
        done = self.machine.attempt()
        faults = [f"exit code {done.code}: {done.screen[-1000:]}"] if done.code else []
        faults += differences(normal(self.folder / "straight"), normal(self.machine.place))
        for fault in faults:
            self._say(f"life {number}: {fault}")
        if faults:
            shutil.rmtree(self.folder / f"fault_{number}", ignore_errors=True)
            self.machine.place.rename(self.folder / f"fault_{number}")
        self.state["faults"] += faults
        self.state["plan"] = []
        self._say(f"life {number}: done, {len(faults)} faults")

    def _new_life(self) -> None:
        shutil.rmtree(self.machine.place, ignore_errors=True)
        self.machine.place.mkdir(parents=True)

    def _save(self) -> None:
        self._state.write_text(json.dumps(self.state, indent=1))

    def _say(self, line: str) -> None:
        print(line, flush=True)


def _in_stage(stage: str, seconds: float) -> Callable[[Attempt], bool]:
    """So many seconds after the stage has begun."""

    def come(attempt: Attempt) -> bool:
        begun = [second for name, second in attempt.stages if name == stage]
        return bool(begun) and attempt.seconds >= begun[0] + seconds

    return come


@contextmanager
def pipeline_of_all_stages(folder: Path) -> Iterator[Campaign]:
    """A campaign over dpo_pipeline_sanity.sh with a judge and a mirror."""
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / "given"
    if not given.exists():
        tiny.save_model(given / "model")
        for name, rows in (("train", tiny.hh_rows(16)), ("test", tiny.hh_rows(6, start=16))):
            (given / "data").mkdir(exist_ok=True)
            tiny.save_pairs(given / "data" / f"{name}.jsonl", rows)
        (given / "recipe").mkdir()
        for stage, options in RECIPE.items():
            own = {"ref_cache": str(folder / "life" / "machine" / "cache")} if stage == "dpo" else {}
            (given / "recipe" / f"{stage}.yaml").write_text(yaml.safe_dump(options | own))
    kept = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "VAL_RATIO")}
    # The same address each time, as it is part of the judge's cache keys
    with FaultServer().serving(int(port.read_text()) if (port := given / "port").exists() else 0) as url:
        port.write_text(str(urlsplit(url).port))
        yield Campaign(
            folder,
            ROOT / "pipelines" / "dpo_pipeline_sanity.sh",
            kept
            | {
                "MODEL_NAME": str(given / "model"),
                "DATASET": str(given / "data"),
                "RECIPE": str(given / "recipe"),
                "JUDGE_MODEL": "judge",
                "JUDGE_BASE_URL": url,
                "MOUNT_DIR": str(folder / "life" / "drive"),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
        )


@contextmanager
def rounds_pipeline(folder: Path) -> Iterator[Campaign]:
    """A campaign over two rounds of rounds.sh."""
    given = folder / "given"
    if not given.exists():
        given.mkdir(parents=True)
        test_rounds.prepare(given)
        (given / "check.py").write_text(LATER_IS_BETTER)
        with (given / "recipe" / "dpo.yaml").open("a") as recipe:
            recipe.write(f"ref_cache: {folder}/life/machine/cache\n")
    yield Campaign(folder, test_rounds.PIPELINE, test_rounds.environment(given))


PIPELINES = {"all_stages": pipeline_of_all_stages, "rounds": rounds_pipeline}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--losses", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--pipeline", choices=PIPELINES, default="all_stages")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.seconds
    with PIPELINES[options.pipeline](options.folder) as campaign:
        campaign.straight()
        done = campaign.go_on(options.kills, options.losses, until)
        print(json.dumps(campaign.state, indent=1))
    if not done:
        print("To be gone on with by the same command")
    return 1 if campaign.state["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
