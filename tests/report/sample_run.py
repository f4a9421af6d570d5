"""Run folders as the stages leave them, small or with a thousand prompts, without training anything."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.formats import prompt_id
from tandem.data.options import DataOptions
from tandem.evaluation.evaluate import HeldOut, Samples, kl_metrics, summarize
from tandem.intervals import estimate
from tandem.judge.log import VerdictLog
from tandem.judge.options import JudgeOptions
from tandem.judge.requests import Call, Comparison, Judge
from tandem.judge.summary import summarise, winners
from tandem.monitor.margins import MarginsLog
from tandem.monitor.tail import TailConfig, TailState, update
from tandem.options.losses import DPOOptions
from tandem.options.model import LoraOptions, ModelOptions, TextOptions
from tandem.options.parsing import resolved
from tandem.options.training import SFTOptions, TrainOptions
from tandem.options.yaml_text import to_yaml
from tandem.runs import write_json

HOSTILE = (
    "</script><script>document.title = 'owned'</script></textarea><img src=x onerror=\"document.title='owned'\">\u2028"
)
TEXT = (
    "You can leave the rice to rest for ten minutes with the lid on and it will finish in its own steam while the "
    "train to the coast runs every hour on weekdays except for the last one which only goes as far as the harbour "
    "so it is best to ask first whether a smaller pot would do since most of the heat is lost through the sides"
)
WORDS = TEXT.split()


def write_results(folder: Path, pairs: int = 100) -> None:
    """SFT gets 58% of the pairs right and DPO 98%, as `evaluate` would have written it."""
    noise = np.random.default_rng(5)
    base = noise.normal(-60, 8, (pairs, 2))

    def policy(right: float, size: float, gain: float) -> Any:
        signs = noise.permutation(np.where(np.arange(pairs) < round(right * pairs), 1, -1))
        margins = signs * np.abs(noise.normal(size, size / 2, pairs))
        return base + gain + np.stack([margins, -margins], axis=1) / 2

    held_out = HeldOut(
        {"base": base, "sft": policy(0.58, 2, 3.0), "dpo": policy(0.98, 10, -2.0)},
        chosen_tokens=noise.integers(15, 40, pairs).astype(float),
        length_difference=noise.integers(-30, 30, pairs),
        sources=noise.permutation(np.resize(["helpful/test.jsonl", f"harmless/{HOSTILE}"], pairs)),
    )
    kl = {}
    for label, size in (("sft", 0.5), ("dpo", 8.0)):
        answers = [{"prompt_ids": [1], "chosen_ids": [1] * 40, "rejected_ids": [1] * 35}] * 16
        ratios = noise.normal(size, size / 2, (16, 2))
        kl[label] = kl_metrics(Samples(answers, ratios), np.zeros((16, 2)), seed=0)
    paths = {"sft": "/runs/demo/sft_dpo_init_merged", "dpo": "/runs/demo/dpo_sanity_merged"}
    about = {"reference": "/models/SmolLM2-135M-Instruct", "paths": paths, "n_pairs": pairs, "n_dropped": 0}
    write_json(folder / "results.json", summarize(held_out, kl, seed=0) | about)


def write_stages(folder: Path) -> None:
    def history(steps: int, record: Any) -> list[dict[str, Any]]:
        return [{"step": step, "epoch": step / steps} | record(step / steps) for step in range(1, steps + 1)]

    noise = random.Random(3)

    def sft(x: float) -> dict[str, float]:
        return {"loss": 2.1 - 0.5 * x + noise.gauss(0, 0.05), "learning_rate": 2e-5 * (1 - x)}

    def dpo(x: float) -> dict[str, float]:
        margin = 4 * x**1.5 + noise.gauss(0, 0.2) * x
        chosen = 1.2 * x + noise.gauss(0, 0.1) * x
        return {
            "loss": math.log1p(math.exp(-margin)),
            "rewards/accuracies": min(1.0, 0.5 + x * 0.6 + noise.gauss(0, 0.06)),
            "rewards/margins": margin,
            "rewards/chosen": chosen,
            "rewards/rejected": chosen - margin,
            "logps/chosen": -62 + 10 * chosen + noise.gauss(0, 2),
            "logps/rejected": -65 + 10 * (chosen - margin) + noise.gauss(0, 2),
        }

    data = DataOptions(dataset_name="/data/sample")
    model, lora, text = ModelOptions("/models/SmolLM2-135M-Instruct"), LoraOptions(use_peft=True), TextOptions()
    stages = {
        "sft": (
            (model, lora, text, data, SFTOptions(output_dir=str(folder / "sft"), learning_rate=2e-5)),
            history(8, sft),
        ),
        "dpo": (
            (model, lora, text, data, TrainOptions(output_dir=str(folder / "dpo"), learning_rate=1e-6), DPOOptions()),
            history(16, dpo),
        ),
    }
    for name, (options, log_history) in stages.items():
        config = resolved(*options)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        environment = {
            "git_sha": "0123456789abcdef0123456789abcdef01234567",
            "python": "3.11.2",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "tandem": "0.1.0"},
            "machine": "Linux x86_64, 2 cores",
        }
        write_json(folder / name / "run.json", {"config": config, **environment})
        write_json(folder / name / "training_metrics.json", {"train": {"train_loss": 0.4}, "log_history": log_history})


def write_margins(folder: Path, steps: int = 16) -> None:
    log = MarginsLog(folder / "dpo" / "logs" / "margins")
    noise = np.random.default_rng(4)
    state = TailState(beta=0.1)
    config = TailConfig(delta=0.1, warmup_steps=4, ema=0.1)
    for step in range(1, steps + 1):
        margins = noise.normal(40 * (step / steps) ** 1.5, 2 + step, 8)
        state, tail = update(state, margins, config)
        log.write_step(1, step, [f"p{step}_{i}" for i in range(8)], margins, tail)
        if tail.warmup_ended:
            log.write_warmup_end(1, step, tail.tau, config.delta)


def write_data(folder: Path) -> None:
    split = {
        "pairs": 400,
        "prompts": 372,
        "formats": {"hh": 400},
        "sources": {"sample": 400},
        "languages": {"en": 400},
        "fingerprint": "5f2d9c41aa07b3e6",
        "chosen_longer": 0.495,
        "bag_of_words": estimate(0.61, 0.58, 0.64, 400),
    }
    tokens = {
        name: {"median": size, "max": 80} for name, size in (("prompt", 41.0), ("chosen", 24.5), ("rejected", 24.0))
    }
    example = {
        "file": "/home/me/data/sample",
        "row": 7,
        "found": f"as {HOSTILE}",
        "prompt": HOSTILE,
        "chosen": "a",
        "rejected": "b",
    }
    finding = {"name": "duplicates", "level": "warning", "split": "train", "count": 3, "share": 0.0075}
    pair = {"file": "/home/me/data/sample", "row": 1, "split": "train", "pair_id": "0011223344556677"}
    write_json(
        folder / "data_report.json",
        {
            "splits": {"train": split | {"tokens": tokens}, "test": split | {"pairs": 100, "prompts": 96}},
            "findings": [
                finding | {"message": "train: 3 of 400 pairs are there more than once", "examples": [example]},
                finding | {"message": f"train: {HOSTILE}", "examples": []},
            ],
            "shown": [
                pair
                | {
                    "prompt": [["<|user|>", "template"], [HOSTILE, "user"], ["</s>", "template"]],
                    "chosen": [["Yes", "assistant"], [".", "assistant"], ["</s>", "template"]],
                    "rejected": [["Yes", "assistant"], ["!", "assistant"], ["</s>", "template"]],
                    "lengths": {"prompt": 3, "chosen": 3, "rejected": 3},
                    "room": 2,
                    "differs_at": 1,
                    "problems": {"answer_cut": f"prompt {HOSTILE}"},
                },
                pair | {"refused": f"No. {HOSTILE}"},
            ],
        },
    )


def write_log(folder: Path) -> None:
    seconds = {"check": 9, "sft": 78, "merge_sft": 11, "dpo": 171, "merge_dpo": 12, "evaluate": 96, "compare": 101}
    seconds["judge"] = 64
    first = "== dpo\n== dpo failed (exit code 1).\n== check: 4 s\n"
    log = "".join(f"== {name}\nsome output\n== {name}: {time} s\n" for name, time in seconds.items())
    again = "== check: done before (/runs/demo/data_report.json)\n"
    (folder / "dpo_pipeline_sanity.log").write_text(first + log + again)


def write_commands(folder: Path) -> None:
    """As `stage` of pipelines/lib.sh writes them, in a run folder of the time."""
    root, run = "/work/checkout", "/work/checkout/runs/demo"
    commands = {
        "check": f"python {root}/scripts/check_data.py --dataset_name '/data/the sample' --report {run}/data.json",
        "dpo": f"launch {root}/scripts/dpo.py --model_name_or_path {run}/sft_merged --output_dir {run}/dpo",
        "sft": f"launch {root}/scripts/sft.py --output_dir {run}/sft --mount_dir {run}_mirror",
        "judge": f"with_local_judge python {root}/scripts/judge.py --run_dir {run}",
    }
    (folder / ".stages").mkdir()
    for name, command in commands.items():
        settings = f"RUN={run} ACCELERATE_CONFIG={root}/accelerate_configs/cpu.yaml"
        judge = " JUDGE_MODEL=/models/judge" if name == "judge" else ""
        (folder / ".stages" / f"{name}.command").write_text(f"{settings}{judge} {command} ")


def sentence(noise: random.Random, words: int) -> str:
    start = noise.randrange(len(WORDS))
    text = " ".join(itertools.islice(itertools.cycle(WORDS), start, start + words))
    return text[0].upper() + text[1:] + "."


def write_comparison(folder: Path, prompts: int, words: int = 55) -> list[dict[str, Any]]:
    """The second prompt's answers are hostile; every fifth prompt has an earlier turn."""
    noise = random.Random(1)
    rows = []
    for index in range(prompts):
        messages = [{"role": "user", "content": f"Question {index}: how long should I let {sentence(noise, 12)}"}]
        if index % 5 == 4:
            earlier = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hello, ask away."}]
            messages = earlier + messages
        answers = {label: sentence(noise, noise.randrange(words // 3, words)) for label in ("base", "sft", "dpo")}
        if index == 1:
            answers["dpo"] = f"Sure. {HOSTILE} done"
        if index == 3:
            answers["base"] = ""
        rows.append(
            {
                "prompt_id": prompt_id(messages),
                "messages": messages,
                "chosen": sentence(noise, 30),
                "answers": answers,
            }
        )
    statistics = {
        label: {"n": prompts, "mean_tokens": tokens, "truncated": cut, "empty": 0.0, "repetition": repeats}
        for label, tokens, cut, repeats in (
            ("base", 61.2, 0.83, 0.12),
            ("sft", 44.0, 0.25, 0.05),
            ("dpo", 39.5, 0.17, 0.04),
        )
    }
    models = {"base": "/models/SmolLM2-135M-Instruct", "sft": "/runs/demo/sft_dpo_init_merged", "dpo": "/runs/demo/dpo"}
    results = {"models": models, "seed": 42, "statistics": statistics, "comparisons": rows}
    write_json(folder / "dpo_comparison_results.json", results)
    return rows


def write_judgement(folder: Path, rows: list[dict[str, Any]], verdict_of: Any, labelled_right: float = 0.9) -> None:
    """Verdicts as the judge's own code keys and summarises them.

    `verdict_of(number of the prompt, order)` is A, B or tie, or a status other than ok.
    """
    options = JudgeOptions(judge_model="a-judge", base_url="http://127.0.0.1:18123/v1", run_dir=str(folder))
    judge = Judge(options.url, options.judge_model, False, None, options.max_output_tokens)
    noise = random.Random(2)
    main = [
        Comparison(row["prompt_id"], row["messages"], row["answers"]["base"], row["answers"]["dpo"], "base", "dpo")
        for row in rows
    ]
    labelled = [
        Comparison(f"l{i}", [{"role": "user", "content": str(i)}], f"wrong {i}", f"right {i}", "rejected", "chosen")
        for i in range(60)
    ]
    plan = {"labelled": judge.calls("labelled", labelled, 1), "self": [], "main": judge.calls("main", main, 1)}

    def labelled_verdict(call: Call) -> str:
        right = (int(call.comparison.prompt_id[1:]) * 37 % 60) / 60 < labelled_right
        return "A" if (call.order == "21") == right else "B"

    records = []
    for kind, calls in plan.items():
        for index, call in enumerate(calls):
            said = labelled_verdict(call) if kind == "labelled" else verdict_of(index // 2, call.order)
            ok = said in ("A", "B", "tie")
            reason = f"Answer {said} keeps to the question. {sentence(noise, 20)}"
            if index == 2:
                reason += HOSTILE
            records.append(
                call.identity
                | {"attempt": 1, "status": "ok" if ok else said, "verdict": said if ok else None}
                | {"rationale": reason if ok else "", "detail": "" if ok else "cut off"}
                | {"input_tokens": 410, "output_tokens": 60}
            )
    (folder / "judge").mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "judge" / "verdicts.jsonl").write_text(text, encoding="utf-8")
    log = VerdictLog(options)
    write_json(folder / "judge" / "usage.json", log.usage())
    write_json(folder / "judge" / "winners.json", winners(plan["main"], log))
    write_json(options.summary_file, summarise(options, judge, plan, log))


def mixed_verdicts(number: int, order: str) -> str:
    """Of ten prompts: 5 won, 2 lost, 1 tie, 1 whose orders disagree, 1 without a verdict."""
    policy, base = ("B", "A") if order == "12" else ("A", "B")
    kind = number % 10
    if kind == 7:
        return "tie"
    if kind == 8:
        return "A"
    if kind == 9:
        return "malformed" if order == "12" else policy
    return policy if kind < 5 else base


def write_whole_run(folder: Path, prompts: int, words: int = 55) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder)
    write_stages(folder)
    write_margins(folder)
    write_data(folder)
    write_log(folder)
    write_commands(folder)
    write_judgement(folder, write_comparison(folder, prompts, words), mixed_verdicts)
    return folder
