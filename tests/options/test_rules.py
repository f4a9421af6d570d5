"""The rules that options carry, and that all that is wrong with a command line is told at once."""

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Iterator

import pytest

import tandem
from tandem.errors import UserError
from tandem.judge.options import JudgeOptions
from tandem.options.fields import REQUIRED, changed, handed_on, opt, options_of
from tandem.options.parsing import parse
from tandem.options.rules import Condition, Options, broken_rules, conditions_of
from tandem.training.option_sets import DPOOptionSet, SFTOptionSet, check, classes


@dataclasses.dataclass
class Oven(Options):
    """Oven."""

    on: bool = opt(False, "heat")
    heat: float = opt(180.0, "degrees", above=50, high=250, needs="on")
    minutes: int = opt(30, "time", low=1, besides={-1: "for until it is done"}, needs="on", trl="max_steps")
    mode: str = opt("fan", "air", choices=("fan", "grill", "both"), trl=True)
    grill_bars: int = opt(2, "bars", low=0, needs="mode=grill|both")
    fan_speed: float = opt(1.0, "share", low=0, below=1.5, unless=("mode=grill|none", "on!=true, the fan is off"))
    trays: list[float] = opt([1.0], "levels", low=1, high=4, hint="levels are counted from below")

    def conflicts(self) -> Iterator[str]:
        if self.heat > 200 and self.minutes > 60:
            yield "--heat and --minutes would burn it"


@dataclasses.dataclass
class Cook(Options):
    """Cook."""

    name: str = opt(REQUIRED, "who")
    gloves: bool = opt(False, "wear them", needs="on")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"on": True, "heat": 50.0}, "--heat must be above 50 and at most 250, not 50.0"),
        ({"on": True, "heat": float("nan")}, "--heat must be above 50 and at most 250, not nan"),
        ({"on": True, "minutes": 0}, "--minutes must be at least 1, or -1 for until it is done, not 0"),
        ({"on": True, "minutes": -1}, None),
        ({"trays": [1.0, 5.0]}, "--trays must be between 1 and 4, not 5.0; levels are counted from below"),
        ({"heat": 100.0, "minutes": 3}, "--heat, --minutes have no effect without --on"),
        ({"grill_bars": 3}, "--grill_bars has no effect without --mode grill or both"),
        ({"grill_bars": 3, "mode": "both"}, None),
        ({"grill_bars": -1, "mode": "both"}, "--grill_bars must not be negative, got -1"),
        ({"fan_speed": 0.5}, "--fan_speed has no effect with --on, the fan is off"),
        ({"on": True, "fan_speed": 0.5, "mode": "grill"}, "--fan_speed has no effect with --mode grill"),
        (
            {"heat": 251.0, "minutes": 61},
            "--heat must be above 50 and at most 250, not 251.0; --heat, --minutes have no effect without --on; "
            "--heat and --minutes would burn it",
        ),
    ],
)
def test_a_broken_rule_is_told(given: dict[str, object], said: str | None):
    if said is None:
        Oven(**given)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as refusal:
        Oven(**given)  # type: ignore[arg-type]
    assert str(refusal.value) == said


def test_a_condition_may_be_on_an_option_of_another_class():
    cook = Cook("Ada", gloves=True)
    assert broken_rules([cook]) == []
    assert broken_rules([cook, Oven()], between=True) == ["--gloves has no effect without --on"]
    assert broken_rules([cook, Oven(on=True)], between=True) == []
    assert broken_rules([cook, Oven()], between=True, without=["on"]) == []


def test_all_faults_of_a_command_line_are_told_at_once():
    """Unknown names, wrong types, what is missing, bounds, what has no effect, within a class and between two."""
    argv = "--heat hot --minutes 0 --trays 9 --grill_bars 3 --gloves"
    with pytest.raises(UserError) as refusal:
        parse(argv.split(), (Oven, Cook), prog="bake.py")
    assert str(refusal.value) == (
        "command line: heat must be a number, not 'hot'; "
        "--name is required: who; "
        "--minutes must be at least 1, or -1 for until it is done, not 0; "
        "--trays must be between 1 and 4, not 9.0; levels are counted from below; "
        "--minutes has no effect without --on; "
        "--grill_bars has no effect without --mode grill or both; "
        "--gloves has no effect without --on"
    )


def test_the_judge_tells_all_its_faults():
    with pytest.raises(UserError) as refusal:
        argv = "--samples 0 --max_attempts 0 --max_flip_rate 3 --temperature -1"
        parse(argv.split(), (JudgeOptions,), prog="judge.py")
    said = str(refusal.value)
    for name in (
        "judge_model is required",
        "samples must",
        "max_attempts must",
        "max_flip_rate must",
        "temperature must",
    ):
        assert f"--{name}" in said


def test_options_that_trl_takes_are_handed_on_under_its_names():
    assert handed_on(Oven(on=True, minutes=5), Cook("Ada")) == {"max_steps": 5, "mode": "fan"}


def all_option_classes() -> list[type[Options]]:
    for module in pkgutil.walk_packages(tandem.__path__, "tandem."):
        if module.name.rpartition(".")[2] in (
            "options",
            "generate",
            "compare",
            "evaluate",
            "page",
            "upload",
            "merge",
            "ray",
        ):
            importlib.import_module(module.name)
    found, pending = [], [Options]
    while pending:
        pending += (subclasses := pending.pop().__subclasses__())
        found += [cls for cls in subclasses if cls.__module__.startswith("tandem.")]
    return found


def test_conditions_name_options_and_values_that_there_are():
    """A condition that is misspelt would never be met, or never be broken."""
    for cls in all_option_classes():
        sets = [classes(SFTOptionSet), classes(DPOOptionSet)]
        together = itertools.chain(
            *sorted(sets, key=lambda each: cls in each)
        )  # where both have a name, its own counts
        known = {option.name: option for each in (*together, cls) for option in options_of(each)}
        for option in options_of(cls):
            for condition in conditions_of(option):
                other = known[condition.name]
                assert condition.name != option.name
                choices = other.rules.choices or (("true", "false") if bool in other.kinds else None)
                if choices is not None:
                    assert set(condition.values) <= {*map(str, choices), "none"}, f"{cls.__name__}.{option.name}"


def test_every_default_keeps_its_bounds():
    for cls in all_option_classes():
        instance = object.__new__(cls)
        for option in options_of(cls):
            setattr(instance, option.name, None if option.default is REQUIRED else option.default)
        assert broken_rules([instance]) == [], cls.__name__


def test_numbers_in_conditions_are_compared_as_numbers():
    for text, value, holds in (("a=0", 0.0, True), ("a=0", 0, True), ("a!=-1", -1, False), ("a=0.5", 0.5, True)):
        assert Condition.read(text).holds(value) is holds


def test_the_dpo_scripts_conflicts_with_a_missing_model():
    """What rests on a value that is missing is left out; the rest is told."""
    argv = "--output_dir out --dataset_name d --lora_r 8 --beta 0 --lora_dropout 0.1"
    with pytest.raises(UserError) as refusal:
        parse(argv.split(), classes(DPOOptionSet), prog="dpo.py", check=check)
    assert str(refusal.value) == (
        "--model_name_or_path is required: model folder or Hub name; an adapter's folder goes on training it; "
        "--lora_r, --lora_dropout have no effect without --use_peft; "
        "--beta must be above 0, not 0.0; "
        "--lora_dropout has no effect without --disable_dropout false"
    )


def test_changed_are_those_that_differ_from_their_default():
    assert changed(Oven(on=True, trays=[1.0], minutes=30)) == ["on"]
