"""The `tandem` command: `tandem dpo …` does what `scripts/dpo.py …` does; other commands concern the installation.

    tandem COMMAND OPTIONS…    run a command; tandem COMMAND --help lists its options
    tandem doctor              what is installed, in a screenful for a bug report
    tandem completion SHELL    completions for bash or zsh: source <(tandem completion bash)
    tandem --version           the versions of Tandem and of the packages it uses

In several processes: accelerate launch --module tandem COMMAND OPTIONS…
"""

import ast
import difflib
import importlib
import pkgutil
from pathlib import Path

import tandem.commands
from tandem.errors import UserError, script_main

_NOT_STAGES = ("cli", "completion", "doctor")


def commands() -> list[str]:
    """The names of the commands that are stages or scripts beside them: those of the files in scripts/."""
    names = (module.name for module in pkgutil.iter_modules(tandem.commands.__path__))
    return sorted(name for name in names if name not in _NOT_STAGES)


def main(argv: list[str]) -> None:
    """Run the command that `argv` names.

    Raises:
        UserError: there is none of that name.
    """
    given, rest = (argv[0] if argv else "--help"), argv[1:]
    name = given.replace("-", "_") if not given.startswith("-") else given
    if name in ("--help", "-h"):
        print(_help())
    elif name == "--version":
        from tandem.commands.doctor import versions

        print(versions())
    elif name == "doctor":
        from tandem.commands.doctor import diagnosis

        _refuse_more(name, rest)
        print(diagnosis())
    elif name == "completion":
        from tandem.commands.completion import completion

        _refuse_more(name, rest[1:])
        print(completion(rest[0] if rest else "", commands()))
    elif name in commands():
        importlib.import_module(f"tandem.commands.{name}").main(rest)
    else:
        raise _unknown(given)


def _refuse_more(name: str, words: list[str]) -> None:
    if words:
        raise UserError(f"tandem {name}: unexpected argument {words[0]}")


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, [*commands(), "doctor", "completion"], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; tandem --help lists them"
    return UserError(f"there is no command {name}{hint}")


def _help() -> str:
    lines = [f"    {name:<14}{_purpose(name)}" for name in commands()]
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", *lines])


def _purpose(name: str) -> str:
    """The first line of a command's docstring, read without importing the command."""
    path = Path(tandem.commands.__path__[0]) / f"{name}.py"
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def run() -> None:
    """The entry point of the installed command."""
    script_main(main)
