import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.options.fields import REQUIRED, opt, refuse
from tandem.options.parsing import parse, resolved
from tandem.options.yaml_text import to_yaml


@dataclasses.dataclass
class Colours:
    """Colours."""

    name: str = opt(REQUIRED, "what it is called")
    count: int = opt(3, "how many")
    rate: float = opt(0.5, "share in %", choices=None)
    wet: bool = opt(False, "still wet")
    dry: bool | None = opt(None, "unset: found out")
    limit: int | None = opt(None, "at most")
    kinds: list[str] = opt(["red"], "which", choices=("red", "blue", "none"))
    weights: list[float] | None = opt(None, "one for each")
    finish: Literal["matt", "gloss"] = opt("matt", "surface", choices=("matt", "gloss"))


def read(*argv: str) -> Colours:
    return parse(argv, (Colours,), prog="paint.py")[0]


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        read(*argv)
    return str(error.value)


def test_defaults_then_yaml_then_command_line(tmp_path: Path):
    file = config(tmp_path, "name: yaml\ncount: 4\nrate: 5e-4\n")
    assert read("--config", file, "--count", "5") == Colours(name="yaml", count=5, rate=5e-4)


def test_yaml_reads_exponents_as_numbers(tmp_path: Path):
    assert yaml.safe_load("5e-4") == "5e-4"  # YAML 1.1 wants a dot: the reason for reading text by type
    assert read("--config", config(tmp_path, "name: a\nrate: 5e-4")).rate == 0.0005


@pytest.mark.parametrize(
    ("text", "expected"),
    [("--wet", True), ("--wet true", True), ("--wet True", True), ("--wet 1", True), ("--wet no", False)],
)
def test_flags_with_and_without_a_value(text: str, expected: bool):
    assert read("--name", "a", *text.split()).wet is expected


@pytest.mark.parametrize("text", ["-1", "-0.5", "-.5", "-1e-5", "-1E+05", "-2.e3"])
def test_negative_numbers(text: str):
    assert read("--name", "a", "--rate", text).rate == float(text)
    assert read("--name", "a", "--weights", "1", text).weights == [1.0, float(text)]


def test_lists():
    colours = read("--name", "a", "--kinds", "red", "blue", "--weights", "1", "0.5")
    assert colours.kinds == ["red", "blue"]
    assert colours.weights == [1.0, 0.5]


def test_none_is_a_value_where_the_option_has_no_unset_state(tmp_path: Path):
    assert read("--name", "a", "--limit", "none").limit is None
    assert read("--name", "a", "--kinds", "none").kinds == ["none"]
    assert read("--config", config(tmp_path, "name: a\nkinds: none")).kinds == ["none"]
    assert read("--config", config(tmp_path, "name: a\nlimit: null")).limit is None


def test_default_lists_are_not_shared():
    read("--name", "a").kinds.append("blue")
    assert read("--name", "a").kinds == ["red"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--name is required: what it is called"),
        (["--name", "a", "--cuont", "3"], "command line: unknown option cuont; did you mean count?"),
        (["--name", "a", "--cou", "3"], "command line: unknown option cou; did you mean count?"),
        (["--name", "a", "--zzz"], "command line: unknown option zzz (see --help)"),
        (
            ["--name", "a", "--api-key", "sk-0123456789abcdefghijklmnop"],
            "command line: unknown option api-key; keys are read from the environment: HF_TOKEN, OPENAI_API_KEY or "
            "WANDB_API_KEY",
        ),
        (["--name", "a", "stray"], "command line: unexpected argument stray (options start with --)"),
        (["--name", "a", "--count", "3.5"], "command line: count must be a whole number, not '3.5'"),
        (["--name", "a", "--count", "none"], "command line: count must be a whole number, not 'none'"),
        (["--name", "a", "--rate", "nan"], "command line: rate must be a number, not 'nan'"),
        (["--name", "a", "--rate", "inf"], "command line: rate must be a number, not 'inf'"),
        (["--name", "a", "--rate", "-inf"], "command line: rate must be a number, not '-inf'"),
        (["--name", "a", "--rate", "-nothing"], "argument --rate: expected one argument (see --help)"),
        (["--name", "a", "--wet", "maybe"], "command line: wet must be true or false, not 'maybe'"),
        (["--name", "a", "--limit", "x"], "command line: limit must be a whole number, not 'x'"),
        (["--name", "a", "--kinds", "green"], "command line: kinds must be one of red, blue, none, not green"),
        (["--name", "a", "--weights", "x"], "command line: weights must be a list (a number each), not ['x']"),
        (["--name", "a", "--finish", "wet"], "command line: finish must be one of matt, gloss, not 'wet'"),
        (["--name"], "argument --name: expected one argument (see --help)"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read: No such file or directory"),
    ],
)
def test_command_line_refusals(argv: list[str], message: str):
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 3", "unknown option cuont; did you mean count?"),
        ("name: a\ncount: 3.5", "count must be a whole number, not '3.5'"),
        ("name: a\ncount: .inf", "count must be a whole number, not '.inf'"),
        ("name: a\ncount: true", "count must be a whole number, not 'true'"),
        ("name: a\ncount: null", "count needs a value"),
        ("name: [a]", "name must be text, not ['a']"),
        ("- name", "must be a mapping of options, not a list"),
        ("name", "must be a mapping of options, not a str"),
        ("name: a\ncount: 1\nname: b", "option name appears twice"),
    ],
)
def test_yaml_refusals(tmp_path: Path, text: str, message: str):
    file = config(tmp_path, text)
    assert refusal("--config", file) == f"--config {file}: {message}"


@pytest.mark.parametrize(
    "name",
    [
        "0123456", "12:30:00", "2026-11-29", "2026-11-29 10:00:00", "1e3", "1_000", "0x1f", "true", "no", "Off", "1.50",
        ".inf", "007", "+5", "1.10", "=",
    ],
)  # fmt: skip
def test_yaml_text_is_what_is_written(tmp_path: Path, name: str):
    assert read("--config", config(tmp_path, f"name: {name}")).name == name
    assert read("--config", config(tmp_path, f"name: '{name}'")).name == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: 010", {"count": 10}),
        ("count: 1e3", {"count": 1000}),
        ("count: 5.0", {"count": 5}),
        ("count: -1_000", {"count": -1000}),
        ("count: '7'", {"count": 7}),
        ("rate: 1", {"rate": 1.0}),
        ("wet: on", {"wet": True}),
        ("wet: Off", {"wet": False}),
        ("wet: yes", {"wet": True}),
        ("limit: ~", {"limit": None}),
        ("limit:", {"limit": None}),
        ("dry: None", {"dry": None}),
        ("weights: [1, 2.5, 1e-3]", {"weights": [1.0, 2.5, 1e-3]}),
        ("kinds: none", {"kinds": ["none"]}),
    ],
)
def test_yaml_is_read_by_the_options_type(tmp_path: Path, text: str, expected: dict[str, object]):
    assert read("--config", config(tmp_path, f"name: a\n{text}")) == Colours(name="a", **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["count: 1:30", "count: 0x1f", "count: 1e999", "count: 2026-11-29", "rate: 1:30", "wet: 2"]
)
def test_yaml_of_another_type_is_refused(tmp_path: Path, text: str):
    name, _, value = text.partition(": ")
    assert f"{name} must be " in refusal("--config", config(tmp_path, f"name: a\n{text}"))
    assert f"{name} must be " in refusal("--name", "a", f"--{name}", value)


def test_yaml_may_repeat_a_part_by_its_anchor(tmp_path: Path):
    assert read("--config", config(tmp_path, "<<: {count: 5, rate: 1}\nname: a")) == Colours("a", count=5, rate=1.0)


def test_empty_yaml_changes_nothing(tmp_path: Path):
    assert read("--config", config(tmp_path, "# nothing\n"), "--name", "a") == Colours("a")


def test_a_key_is_refused_in_a_list_too():
    @dataclasses.dataclass
    class Tags:
        """Tags."""

        tags: list[str] = opt([], "any")

    for value in (["sk-" + "a1" * 17], ["a", "sk-" + "a1" * 17]):
        with pytest.raises(UserError, match="tags holds a key or password"):
            parse(["--tags", *value], (Tags,), prog="p")


def test_broken_yaml_names_the_file_and_the_line(tmp_path: Path):
    file = config(tmp_path, "name: 'a\ncount: 2\n")
    message = " ".join(refusal("--config", file).split())
    assert message.startswith(f"--config {file}: not YAML: ")
    assert "line 1" in message


def test_yaml_cannot_make_objects(tmp_path: Path):
    file = config(tmp_path, "name: !!python/object/apply:os.getcwd []")
    assert "not YAML" in refusal("--config", file)


def test_yaml_that_is_not_text(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes("name: gr\xfcn".encode("latin-1"))
    assert "cannot be read" in refusal("--config", str(tmp_path / "latin.yaml"))
    assert "cannot be read: Is a directory" in refusal("--config", str(tmp_path))


def test_help_is_grouped_and_shows_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\nColours:\n" in text
    assert "share in % (default: 0.5)" in text
    assert "which (default: red)" in text
    assert "still wet (default: false)" in text
    assert "--finish {matt,gloss}" in text
    assert "(required)" in text


def test_print_config_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        read("--name", "a", "--count", "7", "--print_config")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "count: 7  # command line\n" in text
    assert "rate: 0.5  # default\n" in text
    assert "limit: null  # default\n" in text
    assert "kinds: [red]  # default\n" in text


def test_all_mistakes_are_named_together(tmp_path: Path):
    file = config(tmp_path, "nmae: a\ncount: x\n")
    assert refusal("--config", file, "--ratee", "1", "--wet", "maybe", "stray") == (
        "command line: unknown option ratee; did you mean rate?; "
        f"--config {file}: unknown option nmae; did you mean name?; "
        f"--config {file}: count must be a whole number, not 'x'; "
        "command line: wet must be true or false, not 'maybe'"
    )


def test_refusals_of_several_groups_and_of_their_combination():
    @dataclasses.dataclass
    class Dry:
        """Dry."""

        hours: int = opt(1, "how long")

        def __post_init__(self) -> None:
            refuse([f"{self.hours} hours"] if self.hours > 1 else [])

    @dataclasses.dataclass
    class Wet:
        """Wet."""

        litres: int = opt(1, "how much")

        def __post_init__(self) -> None:
            refuse([f"{self.litres} litres"] if self.litres > 1 else [])

    def check(dry: Dry, wet: Wet) -> None:
        refuse(["more litres than hours"] if wet.litres > dry.hours else [])

    def read_both(*argv: str) -> tuple[Dry, Wet]:
        return parse(argv, (Dry, Wet), prog="p", check=check)  # type: ignore[return-value]

    with pytest.raises(UserError, match=r"^2 hours; 3 litres; more litres than hours$"):
        read_both("--hours", "2", "--litres", "3")
    with pytest.raises(UserError, match=r"^more litres than hours$"):
        read_both("--hours", "0")
    assert read_both("--litres", "0") == (Dry(1), Wet(0))


def test_print_config_tells_the_sources_and_the_environment_without_its_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "geheim")
    monkeypatch.setenv("WANDB_BASE_URL", "https://user:geheim@host")
    monkeypatch.setenv("TANDEM_TRAINERS", "trl")
    monkeypatch.setenv("UNRELATED", "1")
    file = config(tmp_path, "name: a\ncount: 4\n")
    with pytest.raises(SystemExit):
        read("--config", file, "--wet", "--print_config")
    lines = capsys.readouterr().out.splitlines()
    assert f"count: 4  # --config {file}" in lines
    assert "wet: true  # command line" in lines
    assert "rate: 0.5  # default" in lines
    assert "# TANDEM_TRAINERS=trl  # environment" in lines
    assert "# HF_TOKEN=(set, not shown)  # environment" in lines
    assert "# WANDB_BASE_URL=https://[hidden]@host  # environment" in lines
    assert not any("geheim" in line or "UNRELATED" in line for line in lines)
    (tmp_path / "printed.yaml").write_text("\n".join(lines))
    assert read("--config", str(tmp_path / "printed.yaml")) == Colours(name="a", count=4, wet=True)


floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"))


@given(
    st.builds(
        Colours,
        name=texts,
        count=st.integers(-(10**12), 10**12),
        rate=floats,
        wet=st.booleans(),
        dry=st.none() | st.booleans(),
        limit=st.none() | st.integers(-5, 5),
        kinds=st.lists(st.sampled_from(["red", "blue", "none"]), min_size=1),
        weights=st.none() | st.lists(floats, min_size=1),
        finish=st.sampled_from(["matt", "gloss"]),
    )
)
def test_a_saved_config_is_read_back(tmp_path_factory: pytest.TempPathFactory, colours: Colours):
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    file.write_text(to_yaml(resolved(colours)), encoding="utf-8")
    printed = file.with_name("printed.yaml")
    with contextlib.redirect_stdout(io.StringIO()) as screen, contextlib.suppress(SystemExit):
        read("--config", str(file), "--print_config")
    printed.write_text(screen.getvalue(), encoding="utf-8")
    for saved in (file, printed):
        again = read("--config", str(saved))
        assert again == colours
        assert math.copysign(1, again.rate) == math.copysign(1, colours.rate)
