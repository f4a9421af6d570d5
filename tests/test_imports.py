"""The direction of imports (docs/architecture.md), and that a wrong command line is answered before anything loads."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tandem"
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))

# docs/architecture.md draws this chain. A room imports from rooms on lower floors, never from its neighbours; the
# modules of the ground floor may import each other.
GROUND = """
    contract credentials demo devices digests errors intervals log markdown_table model_folder objects places ranks runs
    servers widths
"""
FLOORS = (
    tuple(GROUND.split()),
    ("options",),
    ("data", "engine", "monitor"),
    ("models", "judge"),
    ("report",),
    ("answers", "evaluation", "training"),
    ("rounds",),
    ("launch",),
    ("commands",),
    ("__main__",),
)  # fmt: skip
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ARITHMETIC = (
    "intervals", "engine.balance", "engine.layout", "monitor.tail", "judge.bradley_terry", "judge.corrected",
    "judge.statistics",
    "judge.verdicts", "data.select",
)  # fmt: skip
FORBIDDEN_IN_ARITHMETIC = {"trl", "transformers", "openai", "httpx", "requests", "urllib", "socket", "http"}
HEAVY = {"torch", "trl", "transformers", "accelerate", "peft", "datasets"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(SOURCE.rglob("*.py"))
        if path != SOURCE / "__init__.py"
    }


MODULES = modules()


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names that the file imports anywhere in it, lazily too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def own_imports(path: Path) -> set[str]:
    """Modules of tandem that the file imports, without the `tandem.`"""
    found = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "tandem":
            continue
        inner = ".".join(parts[1:])
        while inner and inner not in MODULES:
            inner = inner.rpartition(".")[0]
        if inner:
            found.add(inner)
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def may_import(module: str, other: str) -> bool:
    above, below = FLOOR[room(module)], FLOOR[room(other)]
    return below < above or room(module) == room(other) or above == below == 0


def test_the_modules_were_found():
    assert {"options.parsing", "training.stages", "engine.layout", "data.sources", "judge.verdicts"} <= set(MODULES)
    assert own_imports(MODULES["training.stages"]) >= {
        "training.session",
        "training.trainers.select",
        "training.preparation",
    }
    assert len(SCRIPTS) >= 9


def test_imports_go_down():
    wrong = {
        module: names
        for module, path in MODULES.items()
        if (names := [name for name in own_imports(path) if not may_import(module, name)])
    }
    assert not wrong, f"docs/architecture.md does not draw these imports: {wrong}"
    assert not [module for module, path in MODULES.items() if any(n.startswith("scripts") for n in imported(path))]


def test_no_modules_import_each_other():
    edges = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    while leaves := [module for module, targets in edges.items() if not targets & edges.keys()]:
        for module in leaves:
            del edges[module]
    assert not edges, f"in a circle, or importing one: {sorted(edges)}"


def test_arithmetic_stays_arithmetic():
    for module in ARITHMETIC:
        outside = {name.split(".")[0] for each in reached_from(module) for name in imported(MODULES[each])}
        assert not outside & FORBIDDEN_IN_ARITHMETIC, module


def reached_from(module: str) -> set[str]:
    """The modules of tandem that `module` imports, those import, and so on; and itself."""
    pending, seen = [module], set[str]()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += own_imports(MODULES[name])
    return seen


def test_pairs_are_dealt_without_torch():
    assert "torch" not in {name.split(".")[0] for name in imported(MODULES["engine.balance"])}
    assert own_imports(MODULES["engine.balance"]) == {"widths"}


def test_scripts_are_thin():
    for script in SCRIPTS:
        assert len((ROOT / "scripts" / f"{script}.py").read_text().splitlines()) < 10, script
        assert len((SOURCE / "commands" / f"{script}.py").read_text().splitlines()) < 60, script


def test_missing_options_are_answered_at_once():
    for script in SCRIPTS:
        refuses_at_once(script)


def refuses_at_once(script: str) -> None:
    """One line, exit code 2, under a second of processor time, and nothing heavy imported."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{script}.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    errors, output = process.stderr.read(), process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = errors.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert process.returncode == 2, script
    assert output == ""
    assert len(said) == 1
    assert said[0].startswith("UserError: --")
    assert "is required" in said[0]
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert not loaded & HEAVY, script
    assert usage.ru_utime + usage.ru_stime < 1, script


_DATA = "--dataset_name nope.jsonl"
_HELD_OUT = "--dataset_name {data} --val_ratio 0.5"


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (f"dpo --model_name_or_path {{model}} --output_dir o {_DATA}", "nope.jsonl"),
        ("dpo --model_name_or_path ./nope --output_dir o --dataset_name {data}", "./nope"),
        ("dpo --model_name_or_path {model} --reference_model ./nope --output_dir o --dataset_name {data}", "./nope"),
        (f"sft --model_name_or_path ./nope --output_dir o {_DATA}", "./nope"),
        (f"evaluate --reference_model {{model}} --dpo_model {{model}} {_DATA}", "nope.jsonl"),
        (f"evaluate --reference_model {{model}} --dpo_model ./nope {_HELD_OUT}", "./nope"),
        (f"compare --base_model ./nope --finetuned_model {{model}} {_HELD_OUT} --output_dir o", "./nope"),
        (f"generate --models a=./nope {_HELD_OUT} --output_dir o", "./nope"),
        (f"sample --models a=./nope {_HELD_OUT} --output_dir o", "./nope"),
        (f"check_data {_DATA}", "nope.jsonl"),
        ("check_data --dataset_name {data} --tokenizer_name_or_path ./nope", "./nope"),
        ("make_pairs --scores nope.jsonl --output_dir o", "nope.jsonl"),
        ("merge_lora --adapter ./nope --output_dir o", "./nope"),
        ("merge_shards --checkpoint ./nope --output_dir o", "nope"),
        ("report --run_dir ./nope", "nope"),
        ("upload_hf --folder ./nope --repo_id a/b", "nope"),
    ],
)
def test_what_is_not_there_is_told_at_once(
    command: str, missing: str, tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    """A file, folder or model that was named; in a tenth of the time that the libraries take to import."""
    name, *argv = command.format(model=tiny_model, data=tiny_data).split()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *argv], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2, said
    assert said.count("\n") == 1 and f"{missing}: " in said, said
    assert usage.ru_utime + usage.ru_stime < 1


def test_unknown_options_are_answered_at_once():
    for option in ("--learning-rate", "--bogus", "--trainable"):
        command = [sys.executable, str(ROOT / "scripts" / "dpo.py"), option, "1"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert (process.returncode, said.count("\n")) == (2, 1)
        assert f"unknown option {option[2:]}" in said
        assert usage.ru_utime + usage.ru_stime < 1
